"""Comparison of architectures: by what networks compute, not by how they print."""

import pytest
import torch
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, register_rule
from lightning_zipit.errors import ArchitectureMismatchError

X = torch.randn(16, 3, 12, 12)


def convnet(momentum=0.1, inplace=False, p=0.1, stride=1, eps=1e-5, act=None, padding_mode="zeros"):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding_mode), nn.BatchNorm2d(8, momentum=momentum, eps=eps)),
        *(act or nn.ReLU(inplace), nn.Dropout(p), nn.Conv2d(8, 8, 3, stride=stride, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    ).eval()


def merge(*nets, x=X):
    return merge_backbones({str(number): net for number, net in enumerate(nets)}, [x], MergeSettings(refine=None))


@pytest.mark.parametrize("other", [{"momentum": 0.01}, {"momentum": None}, {"inplace": True}, {"p": 0.2}, {"p": 0.0}])
def test_attributes_without_effect_in_eval_mode_may_differ(other):
    merge(convnet(), convnet(**other))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"stride": 2}, r"`4` \(Conv2d\) has stride=\(1, 1\) in the first and \(2, 2\) in the second"),
        ({"eps": 1e-3}, r"`1` \(BatchNorm2d\) has eps=1e-05 in the first and 0.001"),
        ({"act": nn.LeakyReLU(0.1)}, r"ReLU in the first and .*LeakyReLU in the second"),
        ({"padding_mode": "circular"}, "padding_mode=zeros in the first and circular"),
    ],
)
def test_architecture_differences_are_refused_with_the_reason(other, said):
    with pytest.raises(ArchitectureMismatchError, match=said):
        merge(convnet(), convnet(**other))


def test_the_number_of_heads_is_part_of_the_architecture():
    def net(heads):
        layer = nn.TransformerEncoderLayer(8, heads, 12, batch_first=True)
        return nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 2)).eval()

    with pytest.raises(ArchitectureMismatchError, match="num_heads=2 in the first and 4 in the second"):
        merge(net(2), net(4), x=torch.randn(8, 6, 5))
    with pytest.raises(ArchitectureMismatchError, match="num_heads=1 in the first and 2"):
        merge(net(1), net(2), x=torch.randn(8, 6, 5))


def test_dropout_of_attention_may_differ():
    def net(dropout):
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True)
        return nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 2)).eval()

    merge(net(0.1), net(0.3), x=torch.randn(8, 6, 5))


class Scaled(nn.Module):
    """Has a factor that its `repr` does not show."""

    def __init__(self, factor):
        super().__init__()
        self.layer, self.out, self.factor = nn.Linear(5, 6), nn.Linear(6, 2), factor

    def forward(self, x):
        return self.out((self.layer(x) * self.factor).relu())


class Threshold(nn.Module):
    def __init__(self, level):
        super().__init__()
        self._level = level

    def forward(self, x):
        return torch.where(x.sum() > -1e9, x.clamp(min=self._level), x)


def test_constants_in_a_forward_are_compared():
    with pytest.raises(ArchitectureMismatchError, match=r"2\.0 in the first and 3\.0 in the second"):
        merge(Scaled(2.0), Scaled(3.0), x=torch.randn(8, 5))
    with pytest.raises(ArchitectureMismatchError, match="in the first and"):
        merge(Scaled(torch.tensor([2.0])), Scaled(torch.tensor([3.0])), x=torch.randn(8, 5))
    merge(Scaled(2.0), Scaled(2.0), x=torch.randn(8, 5))


def test_private_attributes_of_a_module_with_a_rule_are_compared():
    register_rule(Threshold, lambda ctx, module, x: x)

    def net(level):
        return nn.Sequential(nn.Linear(5, 6), Threshold(level), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    with pytest.raises(ArchitectureMismatchError, match=r"_level=0\.0 in the first and 0\.5"):
        merge(net(0.0), net(0.5), x=torch.randn(8, 5))
