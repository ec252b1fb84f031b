"""Networks of timm, torchvision, segmentation-models, vit-pytorch, MONAI, diffusers, kornia and lightly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.registry import Inputs, images, network, volumes


def of_timm(name: str, size: int = 64, **arguments: Any) -> None:
    """Enter a model of timm."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, **arguments)

    network("timm", name, images(size=size))(make)


for name, size in {
    "repvgg_a0": 64, "ghostnet_050": 64, "hardcorenas_a": 64, "dla34": 64, "vovnet39a": 64, "resnest14d": 64,
    "skresnet18": 64, "res2net50_26w_4s": 64, "ese_vovnet19b_dw": 64, "cspresnet50": 64, "darknet53": 64,
    "tf_efficientnetv2_b0": 64, "mobilenetv4_conv_small": 64, "fastvit_t8": 64, "edgenext_xx_small": 64,
    "inception_next_atto": 64, "mobileone_s0": 64, "rexnet_100": 64, "selecsls42": 64, "tresnet_m": 64,
}.items():  # fmt: skip
    of_timm(name, size)
for name, arguments in {
    "cait_xxs24_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "pit_ti_224": {"img_size": 64},
    "visformer_tiny": {"img_size": 64},
    "convit_tiny": {"img_size": 64, "depth": 2},
    "crossvit_tiny_240": {"img_size": 240},
    "tnt_s_legacy_patch16_224": {"img_size": 64, "depth": 2},
    "twins_svt_small": {"img_size": 224},
    "efficientformer_l1": {},
    "mvitv2_tiny": {"img_size": 224},
    "gcvit_xxtiny": {"img_size": 224},
    "volo_d1_224": {"img_size": 224},
    "vit_tiny_r_s16_p8_224": {"img_size": 64},
    "naflexvit_base_patch16_gap": {"depth": 1},
}.items():
    of_timm(name, arguments.get("img_size", 224), **arguments)


def of_torchvision(path: str, inputs: Inputs, **arguments: Any) -> None:
    """Enter a model of torchvision."""

    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(path, weights=None, **arguments)

    network("torchvision", path, inputs)(make)


of_torchvision("resnext50_32x4d", images())
of_torchvision("efficientnet_v2_s", images())
of_torchvision("deeplabv3_mobilenet_v3_large", images(), weights_backbone=None)
of_torchvision("r3d_18", volumes(3, 16))
of_torchvision("r2plus1d_18", volumes(3, 16))
of_torchvision("s3d", lambda n: ((torch.randn(n, 3, 14, 64, 64),), {}))
of_torchvision("swin3d_t", lambda n: ((torch.randn(n, 3, 4, 32, 32),), {}))


def of_segmentation(kind: str, encoder: str = "resnet18", size: int = 64, **arguments: Any) -> None:
    """Enter a model of segmentation-models."""

    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        return smp.create_model(kind, encoder_name=encoder, encoder_weights=None, classes=3, **arguments)

    network("segmentation-models", f"{kind}, {encoder}", images(size=size))(make)


for kind in ("unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3plus", "pan", "upernet", "segformer"):
    of_segmentation(kind, size=128 if kind in ("pan", "pspnet") else 64)
of_segmentation("unet", "mobilenet_v2", decoder_attention_type="scse")
of_segmentation("unet", "timm-regnetx_002")
of_segmentation("fpn", "mit_b0")


def of_vit_pytorch(module: str, kind: str, size: int = 32, inputs: Inputs | None = None, **arguments: Any) -> None:
    """Enter a model of vit-pytorch."""

    def make() -> nn.Module:
        import importlib

        return getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**arguments)

    network("vit-pytorch", module, inputs or images(size=size))(make)


PLAIN = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
of_vit_pytorch("simple_vit", "SimpleViT", **PLAIN)
of_vit_pytorch("simple_vit_with_register_tokens", "SimpleViT", **PLAIN)
of_vit_pytorch("deepvit", "DeepViT", **PLAIN)
of_vit_pytorch("parallel_vit", "ViT", num_parallel_branches=2, **PLAIN)
of_vit_pytorch("vit_for_small_dataset", "ViT", **PLAIN)
of_vit_pytorch("local_vit", "LocalViT", **PLAIN)
of_vit_pytorch("rvt", "RvT", **PLAIN)
of_vit_pytorch("sep_vit", "SepViT", 64, num_classes=5, dim=16, depth=(1, 1, 1, 1), heads=(1, 2, 2, 2), window_size=2,
               dropout=0.1)  # fmt: skip
of_vit_pytorch("nest", "NesT", 64, image_size=64, patch_size=4, dim=16, heads=2, num_hierarchies=3,
               block_repeats=(1, 1, 1), num_classes=5)  # fmt: skip
of_vit_pytorch("crossformer", "CrossFormer", 64, num_classes=5, dim=(16, 32, 32, 64), depth=(1, 1, 1, 1),
               global_window_size=(2, 2, 1, 1), local_window_size=2)  # fmt: skip
of_vit_pytorch("mobile_vit", "MobileViT", 64, image_size=(64, 64), dims=[24, 32, 40],
               channels=[8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64], num_classes=5)  # fmt: skip
of_vit_pytorch("cct", "CCT", 32, img_size=(32, 32), embedding_dim=32, n_conv_layers=1, kernel_size=3, stride=2,
               padding=1, num_layers=2, num_heads=4, mlp_ratio=2.0, num_classes=5)  # fmt: skip
of_vit_pytorch("vivit", "ViT", inputs=lambda n: ((torch.randn(n, 3, 4, 32, 32),), {}), image_size=32,
               image_patch_size=8, frames=4, frame_patch_size=2, num_classes=5, dim=32, spatial_depth=2,
               temporal_depth=2, heads=4, mlp_dim=64)  # fmt: skip
of_vit_pytorch("vit_1d", "ViT", inputs=lambda n: ((torch.randn(n, 3, 64),), {}), seq_len=64, patch_size=8,
               num_classes=5, dim=32, depth=2, heads=4, mlp_dim=64)  # fmt: skip
of_vit_pytorch("max_vit", "MaxViT", 64, num_classes=5, dim=16, dim_head=8, depth=(1, 1), window_size=4,
               dim_conv_stem=16)  # fmt: skip


def of_monai(kind: str, inputs: Inputs, **arguments: Any) -> None:
    """Enter a network of MONAI."""

    def make() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, kind)(**arguments)

    network("MONAI", kind, inputs)(make)


THREE = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
of_monai("BasicUNet", volumes(), features=(8, 8, 16, 16, 16, 8), **THREE)
of_monai("DynUNet", volumes(), kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
         filters=[8, 16, 16], **THREE)  # fmt: skip
of_monai("SegResNet", volumes(), init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1), **THREE)
of_monai("AttentionUnet", volumes(), channels=(8, 16, 16), strides=(2, 2), **THREE)
of_monai("VNet", volumes())
of_monai("UNETR", volumes(), img_size=32, feature_size=8, hidden_size=32, mlp_dim=64, num_heads=4, in_channels=1,
         out_channels=2)  # fmt: skip
of_monai("HighResNet", volumes(size=16), **THREE)
of_monai("FlexibleUNet", images(size=64), in_channels=3, out_channels=2, backbone="efficientnet-b0")
of_monai("SEResNet50", images(), spatial_dims=2, in_channels=3, num_classes=5)
of_monai("Regressor", lambda n: ((torch.randn(n, 1, 32, 32),), {}), in_shape=(1, 32, 32), out_shape=(2,),
         channels=(8, 16), strides=(2, 2))  # fmt: skip
of_monai("ViTAutoEnc", images(1, 32), in_channels=1, img_size=(32, 32), patch_size=(8, 8), spatial_dims=2,
         hidden_size=32, mlp_dim=64, num_layers=2, num_heads=4)  # fmt: skip


@network("diffusers", "UNet2DModel", lambda n: ((torch.randn(n, 3, 32, 32), torch.randint(1000, (n,))), {}))
def _unet() -> nn.Module:
    import diffusers

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    return diffusers.UNet2DModel(sample_size=32, **blocks, **sizes)


@network("diffusers", "AutoencoderKL", images(size=32))
def _autoencoder() -> nn.Module:
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**blocks, block_out_channels=(16, 32), norm_num_groups=4)


@network("diffusers", "DiTTransformer2DModel", lambda n: ((torch.randn(n, 4, 8, 8),), {
    "timestep": torch.randint(100, (n,)), "class_labels": torch.randint(5, (n,))}))  # fmt: skip
def _dit() -> nn.Module:
    import diffusers

    return diffusers.DiTTransformer2DModel(
        4, 8, 4, num_layers=2, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=5
    )


@network("lightly", "SimCLR: a ResNet with a projection head", images())
def _simclr() -> nn.Module:
    import torchvision
    from lightly.models.modules import SimCLRProjectionHead

    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    return nn.Sequential(backbone, nn.Flatten(), SimCLRProjectionHead(512, 64, 16))


@network("lightly", "BYOL: projection and prediction heads", images())
def _byol() -> nn.Module:
    import torchvision
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    return nn.Sequential(backbone, nn.Flatten(), BYOLProjectionHead(512, 64, 16), BYOLPredictionHead(16, 64, 16))


def of_kornia(kind: str, size: int, **arguments: Any) -> None:
    """Enter a model of kornia."""

    def make() -> nn.Module:
        import kornia.contrib
        import kornia.feature
        import kornia.models

        places = (kornia.contrib, kornia.feature, kornia.models)
        return next(getattr(place, kind) for place in places if hasattr(place, kind))(**arguments)

    network("kornia", kind, images(arguments.pop("channels", 3), size))(make)


of_kornia("VisionTransformer", 32, image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
of_kornia("TinyViT", 64, img_size=64, num_classes=5)
of_kornia("HardNet", 32, channels=1)
of_kornia("SOSNet", 32, channels=1)
