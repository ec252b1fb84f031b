"""Networks that were never written for this package, merged with copies of themselves."""

import copy

import pytest
import torch
import torchvision.models as tv
from architectures import relative_error, unsettle
from helpers.nets import HandWrittenViT, PlainNet, SmallResNet, TokenNet, torchvision_net
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.prove import random_permutations
from lightning_zipit.paths import AllHeads


def named(name):
    return lambda: torchvision_net(name)


def one_dimensional():
    return nn.Sequential(
        *(nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True), nn.PReLU(8)),
        *(nn.ConvTranspose1d(8, 12, 4, stride=2), nn.GroupNorm(3, 12), nn.LeakyReLU()),
        *(nn.ConvTranspose1d(12, 12, 3, groups=3), nn.PReLU(), nn.Conv1d(12, 6, 3, groups=3), nn.LeakyReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)),
    )


def three_dimensional():
    return nn.Sequential(
        *(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.LeakyReLU(), nn.Conv3d(6, 12, 3, groups=6), nn.LeakyReLU()),
        *(nn.Conv3d(12, 6, 1, groups=6), nn.Softplus(), nn.ConvTranspose3d(6, 6, 2, groups=6), nn.AvgPool3d(2)),
        *(nn.Conv3d(6, 6, 1), nn.RMSNorm(3), nn.Flatten(), nn.Linear(6 * 27, 5)),
    )


SMALL_VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
SMALL_SWIN = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
SMALL_MAXVIT = {
    **{
        "input_size": (32, 32),
        "stem_channels": 8,
        "partition_size": 4,
        "block_channels": [8, 16],
        "block_layers": [1, 1],
    },
    **{"head_dim": 4, "stochastic_depth_prob": 0.2},
}
SMALL_REGNET = tv.regnet.BlockParams.from_init_params(depth=4, w_0=16, w_a=10.0, w_m=2.5, group_width=8, se_ratio=0.25)
SMALL_MOBILENET_V3 = [
    tv.mobilenetv3.InvertedResidualConfig(8, 3, 8, 8, True, "RE", 2, 1, 1),
    tv.mobilenetv3.InvertedResidualConfig(8, 3, 24, 12, True, "HS", 2, 1, 1),
    tv.mobilenetv3.InvertedResidualConfig(12, 5, 24, 12, False, "HS", 1, 1, 1),
]
SMALL_EFFICIENTNET = [
    tv.efficientnet.MBConvConfig(1, 3, 1, 16, 8, 1),
    tv.efficientnet.MBConvConfig(6, 3, 2, 8, 16, 2),
    tv.efficientnet.FusedMBConvConfig(4, 3, 1, 16, 24, 1),
]
SMALL = {
    # name: (network, input size, where to cut)
    "small_resnet": (SmallResNet, 16, ("layer1.0", "layer2")),
    "plain": (PlainNet, 16, ("features.0", "classifier.1")),
    "densenet": (lambda: tv.DenseNet(16, (2, 4, 2), 32, num_classes=5), 64, ("features.denseblock2.denselayer3",)),
    "squeezenet1_1": (named("squeezenet1_1"), 64, ("features.6", "features.10")),
    "shufflenet": (
        lambda: tv.ShuffleNetV2([2, 2, 1], [8, 16, 24, 32, 48], 5),
        *(64, ("stage2", "stage3.1.branch2.3")),
    ),
    "convnext": (
        lambda: tv.ConvNeXt(
            [tv.convnext.CNBlockConfig(16, 32, 2), tv.convnext.CNBlockConfig(32, None, 1)], num_classes=5
        ),
        *(64, ("features.1.0",)),
    ),
    "vit": (lambda: tv.VisionTransformer(**SMALL_VIT, num_classes=5), 32, ("encoder.layers.encoder_layer_0",)),
    "swin": (lambda: tv.SwinTransformer(**SMALL_SWIN, num_classes=5), 32, ("features.1.0",)),
    "swin v2": (
        lambda: tv.SwinTransformer(
            **SMALL_SWIN,
            num_classes=5,
            block=tv.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=tv.swin_transformer.PatchMergingV2,
        ),
        *(32, ("features.2",)),
    ),
    "maxvit": (lambda: tv.MaxVit(**SMALL_MAXVIT, num_classes=5), 32, ("blocks.0.layers.0.layers.window_attention",)),
    "regnet": (lambda: tv.RegNet(SMALL_REGNET, num_classes=5), 32, ("trunk_output.block2.block2-0.f.se",)),
    "mobilenet_v2": (
        lambda: tv.MobileNetV2(5, inverted_residual_setting=[[1, 8, 1, 1], [6, 12, 2, 2]]),
        *(32, ("features.2.conv.1",)),
    ),
    "mobilenet_v3": (lambda: tv.MobileNetV3(SMALL_MOBILENET_V3, 32, num_classes=5), 32, ("features.2",)),
    "efficientnet": (lambda: tv.EfficientNet(SMALL_EFFICIENTNET, 0.2, num_classes=5), 32, ("features.2",)),
}
LARGE = {
    "shufflenet_v2_x0_5": (named("shufflenet_v2_x0_5"), 64, ("stage2", "stage3.1.branch2.3")),
    "resnet18": (named("resnet18"), 64, ("layer2", "layer3.0.bn1")),
    "resnext": (
        lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5, groups=8, width_per_group=8),
        *(64, ("layer2.1.conv2", "layer3")),
    ),
    "regnet_x_400mf": (named("regnet_x_400mf"), 64, ("trunk_output.block3",)),
    "regnet_y_400mf": (named("regnet_y_400mf"), 64, ("trunk_output.block3.block3-1.f.se",)),
    "vgg11_bn": (named("vgg11_bn"), 64, ("features.0", "avgpool")),
    "alexnet": (named("alexnet"), 64, ("features.6", "avgpool")),
    "googlenet": (named("googlenet"), 64, ("inception4a", "inception3a.branch2")),
    "inception_v3": (lambda: tv.inception_v3(num_classes=5, init_weights=False, aux_logits=False), 80, ("Mixed_6a",)),
    "mobilenet_v2": (named("mobilenet_v2"), 64, ("features.7", "features.3.conv.1")),
    "mobilenet_v3_small": (named("mobilenet_v3_small"), 64, ("features.4",)),
    "mnasnet0_5": (named("mnasnet0_5"), 64, ("layers.9",)),
    "efficientnet_b0": (named("efficientnet_b0"), 64, ("features.3",)),
}
OTHER = {
    "attention written out": (HandWrittenViT, torch.randn(48, 3, 16, 16), ("blocks.0", "blocks.1.fc1")),
    "attention without fusing": (lambda: HandWrittenViT(fused=False), torch.randn(48, 3, 16, 16), ("blocks.0.norm2",)),
    "one dimension": (one_dimensional, torch.randn(48, 3, 20), ("3", "6")),
    "three dimensions": (three_dimensional, torch.randn(48, 2, 10, 10, 10), ("3", "7")),
    "tokens": (TokenNet, torch.randint(0, 30, (48, 12)), ("encoder.layers.0",)),
    "tokens, norm last": (lambda: TokenNet(norm_first=False), torch.randint(0, 30, (48, 12)), ("encoder.layers.0",)),
}


def make(name):
    torch.manual_seed(0)
    network, data, cuts = {**LARGE, **SMALL, **OTHER}[name]
    x = torch.randn(24, 3, data, data) if isinstance(data, int) else data
    return unsettle(network(), x), x, cuts


@torch.no_grad()
def assert_keeps_its_function(net, x, pairs, verify=True):
    """Merge a network with others that compute the same."""
    expected = net(x[:4])
    for other, stop_at in pairs:
        settings = MergeSettings(stop_at, refine=None, verify=verify)
        merged = merge_backbones({"a": net, "b": other}, list(x[None]), settings)
        assert relative_error(AllHeads(merged.trunk, merged.heads)(x[:4]), expected) < 1e-3, stop_at


@torch.no_grad()
def permuted_copy(net, x):
    whole = trace(net, verify=x[:2])
    permuted = permute_spaces(net, whole, random_permutations(whole))
    assert relative_error({"permuted": permuted(x[:4])}, net(x[:4])) < 1e-3
    return permuted


@pytest.mark.parametrize("name", [*SMALL, *OTHER])
def test_a_model_merged_with_a_permuted_copy_gives_the_same_function(name):
    net, x, cuts = make(name)
    other = permuted_copy(net, x)
    assert_keeps_its_function(net, x, [(other, None), (other, cuts[-1])], verify=False)  # it was proved


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*LARGE, *SMALL, *OTHER])
def test_so_it_does_at_every_cut_and_with_itself(name):
    net, x, cuts = make(name)
    other = permuted_copy(net, x)
    assert_keeps_its_function(net, x, [(other, None), *((other, cut) for cut in cuts), (copy.deepcopy(net), cuts[-1])])
