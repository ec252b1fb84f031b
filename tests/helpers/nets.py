"""Small networks and LightningModules, written as a user would."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


class SmallResNet(nn.Module):
    """Two stages of two blocks, 8 and 16 channels."""

    def __init__(self, num_classes=5, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width), Block(width, width))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PlainNet(nn.Module):
    """No batch norm: conv, pool, and a flatten over positions."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Linear(12 * 36, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, num_classes))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Lit(LightningModule):
    """A classifier with its own metric and logging."""

    def __init__(self, num_classes: int = 5, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.net = SmallResNet(num_classes, width)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x):
        return self.net(x)

    def test_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("test_acc", self.accuracy)
        self.log_dict({"test_loss": F.cross_entropy(logits, y)})

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(-1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(-1)


class LitWhole(LightningModule):
    """The layers are the LightningModule's own: the backbone is ``""``."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))


class SplitNet(nn.Module):
    """A stem, which may be deeper and see other channels than that of the next, a body and a head."""

    def __init__(self, channels=3, deep=False, num_classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        if deep:
            self.stem.extend([nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()])
        self.body = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        )
        self.head = nn.Linear(12, num_classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class LitSplit(LightningModule):
    """A classifier for images of some number of channels."""

    def __init__(self, channels: int = 3, deep: bool = False, num_classes: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = SplitNet(channels, deep, num_classes)

    def forward(self, x):
        return self.net(x)

    def test_step(self, batch, batch_idx):
        self.log("acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    validation_step = test_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def gray(x):
    """Images in colour as grayscale images."""
    return x.mean(1, keepdim=True)


class Wrap(LightningModule):
    """Any network; saves no hyperparameters."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def trainer(**arguments):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    warnings.filterwarnings("ignore", module="lightning")
    return Trainer(**({"accelerator": "cpu"} | quiet | arguments))


def images(count=48, size=16, classes=5, seed=0, batch_size=16, channels=3):
    """A loader of noise with labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, size, size, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, classes, (count,), generator=generator)), batch_size)


@torch.no_grad()
def settle(net, *batches):
    """Give the norms random scales, then the statistics of real batches: a network as training leaves it."""
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.1 + 0.3)
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for x in batches:
        net(x)
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


def settled_pair(count=32):
    """Two modules of 5 and 7 classes with statistics of batch norm; ``count`` is of the images they come from."""
    torch.manual_seed(0)
    models = {"a": Lit(5), "b": Lit(7)}
    for model in models.values():
        settle(model.net, torch.randn(count, 3, 16, 16))
    return models


def torchvision_net(name, **arguments):
    """A torchvision model with 5 classes; the fully connected layers of AlexNet and VGG have 64 features."""
    net = getattr(torchvision.models, name)(num_classes=5, **arguments)
    if name.startswith(("alexnet", "vgg")):
        inputs = next(module.in_features for module in net.classifier if isinstance(module, nn.Linear))
        net.classifier = nn.Sequential(
            *(nn.Linear(inputs, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout()),
            nn.Linear(64, 5),
        )
    return net.eval()


class HandWrittenViT(nn.Module):
    """A vision transformer whose attention is written out, as libraries do: queries, keys and values in one layer."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 2, fused: bool = True):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.blocks = nn.Sequential(*(HandWrittenBlock(width, heads, fused) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class HandWrittenBlock(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("k_bias", torch.zeros(width))
        self.of_heads = nn.Parameter(torch.randn(heads, 1, 1))
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)

    def attend(self, x):
        batch, tokens, width = x.shape
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * self.of_heads.exp()).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, x):
        x = x + self.attend(self.norm1(x)) * self.scale
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TokenNet(nn.Module):
    """A transformer over tokens, as PyTorch's own layers make one."""

    def __init__(self, tokens: int = 30, width: int = 16, classes: int = 5, norm_first: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(torch.randn(1, 12, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 24, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position[:, : tokens.shape[1]]
        return self.head(self.encoder(x).mean(1))
