"""A dozen small networks, each with another way to tie features."""

from __future__ import annotations

import math

import torch
from torch import nn


class Mean(nn.Module):
    """The mean over positions or tokens."""

    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.mean(self.axes)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.act = nn.Tanh()

    def forward(self, x):
        return self.last(torch.relu(self.second(self.act(self.first(x)))))


class PlainCNN(nn.Module):
    """Flattens a map of 2 × 2 positions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3, bias=False)
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.hidden, self.last = nn.Linear(5 * 4, 9), nn.Linear(9, 3)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv2(self.act(self.conv1(x)))))
        return self.last(torch.relu(self.hidden(x.flatten(1))))


class NormedCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.act, self.last = nn.ReLU(), nn.Linear(8, 3)
        self.mean = Mean(2, 3)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        return self.last(self.mean(torch.relu(self.bn2(self.conv2(x)))))


class Block(nn.Module):
    def __init__(self, inputs, inner, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class Residual(nn.Module):
    """A block on the stream of the stem, and one with a shortcut convolution that starts another stream."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.block1, self.block2 = Block(6, 5, 6), Block(6, 7, 8, stride=2)
        self.last = nn.Linear(8, 3)
        self.mean = Mean(2, 3)

    def forward(self, x):
        x = self.block2(self.block1(torch.relu(self.bn(self.conv(x)))))
        return self.last(self.mean(x))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, as in MobileNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.deep1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.point1, self.bn2 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.deep2, self.point2 = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 7, 1)
        self.act, self.last = nn.Hardswish(), nn.Linear(7, 3)
        self.mean = Mean(2, 3)

    def forward(self, x):
        x = self.bn1(self.deep1(torch.relu(self.bn0(self.stem(x)))))
        x = self.act(self.bn2(self.point1(torch.relu(x))))
        return self.last(self.mean(torch.relu(self.point2(self.deep2(x)))))


class Dense(nn.Module):
    """Every layer reads all before it, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3, padding=1)
        self.bn3, self.last = nn.BatchNorm2d(15), nn.Linear(15, 3)
        self.mean = Mean(2, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.conv1(torch.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(torch.relu(self.bn2(x)))], 1)
        return self.last(self.mean(torch.relu(self.bn3(x))))


class Grouped(nn.Module):
    """A convolution in two groups between two whole ones."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 8, 3, groups=2)
        self.conv3, self.last = nn.Conv2d(8, 9, 3), nn.Linear(9, 3)
        self.act = nn.ReLU()
        self.mean = Mean(2, 3)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.last(self.mean(self.act(self.conv3(x))))


class TokenMLP(nn.Module):
    """A residual stream of tokens with layer norms."""

    def __init__(self):
        super().__init__()
        self.position, self.embed = nn.Parameter(torch.randn(1, 5, 8)), nn.Linear(4, 8)
        self.norm1, self.up1, self.down1 = nn.LayerNorm(8), nn.Linear(8, 11), nn.Linear(11, 8)
        self.act, self.norm2, self.up2 = nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 10)
        self.last = nn.Linear(10, 3)
        self.mean = Mean(1)

    def forward(self, x):
        x = self.embed(x) + self.position
        x = x + self.down1(self.act(self.up1(self.norm1(x))))
        return self.last(self.mean(torch.tanh(self.up2(self.norm2(x)))))


class Transformer(nn.Module):
    """A block of attention with two heads, whose queries, keys and values are layers of their own."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(4, 10), nn.LayerNorm(10), nn.LayerNorm(10)
        self.q, self.k, self.v = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(10, 4)
        self.proj, self.up, self.down = nn.Linear(4, 10), nn.Linear(10, 12), nn.Linear(12, 10)
        self.norm, self.last = nn.LayerNorm(10), nn.Linear(10, 3)
        self.mean = Mean(1)

    def heads(self, x):
        return x.reshape(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm1(x)
        q, k, v = self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y))
        attention = (q @ k.transpose(-2, -1) / math.sqrt(3)).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).flatten(2))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        return self.last(self.mean(self.norm(x)))


class LanguageModel(nn.Module):
    """Embedding and output layer are not tied."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm1 = nn.Embedding(13, 9), nn.LayerNorm(9)
        self.up, self.down, self.act = nn.Linear(9, 12), nn.Linear(12, 9), nn.SiLU()
        self.norm2, self.last = nn.LayerNorm(9), nn.Linear(9, 13, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(self.act(self.up(self.norm1(x))))
        return self.last(self.norm2(x))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.bn1 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down2, self.pool, self.act = nn.Conv2d(6, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()
        self.up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.mix, self.last = nn.Conv2d(11, 7, 3, padding=1), nn.Conv2d(7, 3, 1)

    def forward(self, x):
        skip = torch.relu(self.bn1(self.down1(x)))
        x = torch.relu(self.up(torch.relu(self.down2(self.pool(skip)))))
        return self.last(self.act(self.mix(torch.cat([x, skip], 1))))


class Decoder(nn.Module):
    """From a code to an image, by transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.up0, self.act = nn.ConvTranspose2d(6, 7, 2), nn.ReLU()
        self.up1, self.bn1 = nn.ConvTranspose2d(7, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.up2, self.last = nn.ConvTranspose2d(8, 5, 2), nn.ConvTranspose2d(5, 2, 3)

    def forward(self, x):
        x = torch.relu(self.up0(x[:, :, None, None]))
        x = self.act(self.bn1(self.up1(x)))
        return self.last(torch.relu(self.up2(x)))


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.conv2, self.act, self.last = nn.Conv2d(8, 7, 3), nn.ReLU(), nn.Linear(7, 3)
        self.mean = Mean(2, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.last(self.mean(self.act(self.conv2(x * gate))))
