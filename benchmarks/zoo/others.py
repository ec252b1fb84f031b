"""Networks for text, series, tables and graphs: x-transformers, PyTorch Geometric, and what tutorials write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ids, network, vectors


def of_x_transformers(name: str, decoder: bool, **arguments: Any) -> None:
    """Enter a transformer of x-transformers."""

    def make() -> nn.Module:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        layers = (Decoder if decoder else Encoder)(dim=32, depth=2, heads=4, **arguments)
        return TransformerWrapper(num_tokens=99, max_seq_len=16, attn_layers=layers)

    network("x-transformers", name, ids())(make)


of_x_transformers("encoder, GLU and RMSNorm", False, ff_glu=True, use_rmsnorm=True)
of_x_transformers("decoder, rotary", True, rotary_pos_emb=True, attn_dim_head=16)
of_x_transformers("decoder, ALiBi", True, alibi_pos_bias=True)
of_x_transformers("decoder, one key-value head", True, attn_one_kv_head=True)
of_x_transformers("encoder, T5 position bias", False, rel_pos_bias=True)
of_x_transformers("decoder, normed queries and keys", True, attn_qk_norm=True)
of_x_transformers("decoder, sandwich norm and gates", True, sandwich_norm=True, attn_gate_values=True)
of_x_transformers("encoder, talking heads", False, attn_pre_talking_heads=True)
of_x_transformers("decoder, shifted tokens", True, shift_tokens=1)
of_x_transformers("encoder, Macaron", False, macaron=True)


def _edges(count: int) -> Tensor:
    """The edges of a ring."""
    nodes = torch.arange(count)
    return torch.cat([torch.stack([nodes, nodes.roll(1)]), torch.stack([nodes, nodes.roll(-1)])], 1)


def of_geometric(kind: str, **arguments: Any) -> None:
    """Enter a network of PyTorch Geometric on dense graphs of one batch of nodes."""

    def make() -> nn.Module:
        from torch_geometric.nn import models

        class OnRing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = getattr(models, kind)(**arguments)

            def forward(self, x: Tensor) -> Tensor:
                flat = x.flatten(0, 1)
                of_one = _edges(6).to(x.device)
                offsets = 6 * torch.arange(x.shape[0], device=x.device)
                edges = (of_one[:, None] + offsets[None, :, None]).flatten(1)
                return self.net(flat, edges).unflatten(0, (-1, 6))

        return OnRing()

    network("PyTorch Geometric", f"{kind} on batches of rings", vectors(6, 8))(make)


SIZES = {"in_channels": 8, "hidden_channels": 16, "num_layers": 2, "out_channels": 4}
for kind in ("GCN", "GraphSAGE", "GIN", "GAT"):
    of_geometric(kind, **SIZES)


@network("torch", "nn.Transformer", lambda n: ((torch.randn(n, 10, 32), torch.randn(n, 6, 32)), {}))
def _transformer() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True)


@network("torch", "LSTM, attention over its outputs", ids())
def _lstm() -> nn.Module:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(99, 16)
            self.lstm = nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True)
            self.score, self.out = nn.Linear(48, 1), nn.Linear(48, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden, _ = self.lstm(self.embedding(tokens))
            weights = self.score(hidden).softmax(1)
            return self.out((weights * hidden).sum(1))

    return Tagger()


@network(
    "torch", "GRU sequence to sequence, teacher forced", lambda n: ((torch.randn(n, 12, 6), torch.randn(n, 4, 2)), {})
)
def _sequence() -> nn.Module:
    class Forecaster(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.GRU(6, 24, batch_first=True), nn.GRU(2, 24, batch_first=True)
            self.out = nn.Linear(24, 2)

        def forward(self, past: Tensor, future: Tensor) -> Tensor:
            _, state = self.encoder(past)
            return self.out(self.decoder(future, state)[0])

    return Forecaster()


@network("torch", "WaveNet: dilated gated convolutions with skips", vectors(1, 64))
def _wavenet() -> nn.Module:
    class WaveNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(1, 16, 1)
            self.filters = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**i) for i in range(4))
            self.skips = nn.ModuleList(nn.Conv1d(16, 24, 1) for _ in range(4))
            self.residuals = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(4))
            self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(24, 24, 1), nn.ReLU(), nn.Conv1d(24, 5, 1))

        def forward(self, x: Tensor) -> Tensor:
            x, skips = self.first(x), []
            for filters, skip, residual in zip(self.filters, self.skips, self.residuals, strict=True):
                moved = filters(nn.functional.pad(x, (filters.dilation[0], 0)))
                value, gate = moved.chunk(2, dim=1)
                z = value.tanh() * gate.sigmoid()
                skips.append(skip(z))
                x = x + residual(z)
            return self.last(sum(skips))

    return WaveNet()


@network("torch", "TCN with weight norm", vectors(4, 48))
def _tcn() -> nn.Module:
    from torch.nn.utils.parametrizations import weight_norm

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
            super().__init__()
            self.conv = weight_norm(nn.Conv1d(inputs, outputs, 3, padding=2 * dilation, dilation=dilation))
            self.down = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

        def forward(self, x: Tensor) -> Tensor:
            moved = self.conv(x)[:, :, : x.shape[2]].relu()
            return torch.relu(moved + (x if self.down is None else self.down(x)))

    body = [Block(4, 16, 1), Block(16, 16, 2), Block(16, 16, 4)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 3))


@network(
    "torch", "DLRM: embeddings and pairwise products", lambda n: ((torch.randn(n, 6), torch.randint(20, (n, 3))), {})
)
def _dlrm() -> nn.Module:
    class Dlrm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bottom = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
            self.embeddings = nn.ModuleList(nn.Embedding(20, 16) for _ in range(3))
            self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
            x = self.bottom(dense)
            all_of = torch.stack([x] + [emb(sparse[:, i]) for i, emb in enumerate(self.embeddings)], 1)
            products = torch.bmm(all_of, all_of.transpose(1, 2))
            row, column = torch.tril_indices(4, 4, offset=-1)
            return self.top(torch.cat([x, products[:, row, column]], 1)).squeeze(1)

    return Dlrm()


@network("torch", "PointNet with an input transform", vectors(3, 40))
def _pointnet() -> nn.Module:
    class PointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.align = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
            self.matrix = nn.Linear(16, 9)
            self.features = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 48, 1))
            self.out = nn.Linear(48, 5)

        def forward(self, x: Tensor) -> Tensor:
            matrix = self.matrix(self.align(x).max(2)[0]).view(-1, 3, 3) + torch.eye(3, device=x.device)
            moved = torch.bmm(x.transpose(1, 2), matrix).transpose(1, 2)
            return self.out(torch.max(self.features(moved), 2).values)

    return PointNet()


@network("torch", "mixture of experts, dense gates", vectors(12))
def _experts() -> nn.Module:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(12, 32)
            self.gate = nn.Linear(32, 4)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 32)) for _ in range(4)
            )
            self.out = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            gates = self.gate(x).softmax(-1)
            mixed = torch.stack([expert(x) for expert in self.experts], 1)
            return self.out((gates.unsqueeze(-1) * mixed).sum(1) + x)

    return Experts()


@network(
    "torch",
    "FiLM: one input scales the features of another",
    lambda n: ((torch.randn(n, 3, 32, 32), torch.randn(n, 8)), {}),
)
def _film() -> nn.Module:
    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)
            self.film, self.out = nn.Linear(8, 48), nn.Linear(24, 5)

        def forward(self, image: Tensor, given: Tensor) -> Tensor:
            scale, shift = self.film(given).chunk(2, 1)
            x = self.second(self.first(image).relu())
            x = x * (1 + scale[..., None, None]) + shift[..., None, None]
            return self.out(x.relu().mean((2, 3)))

    return Film()


@network(
    "torch", "siamese network with a distance", lambda n: ((torch.randn(n, 3, 32, 32), torch.randn(n, 3, 32, 32)), {})
)
def _siamese() -> nn.Module:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            body = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 24, 3, 2), nn.ReLU()]
            self.features = nn.Sequential(*body, nn.Flatten(), nn.Linear(24 * 49, 32))
            self.out = nn.Linear(32, 1)

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.out((self.features(one) - self.features(other)).abs())

    return Siamese()


@network("torch", "conditional VAE", lambda n: ((torch.randn(n, 1, 28, 28), torch.randint(10, (n,))), {}))
def _vae() -> nn.Module:
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label = nn.Embedding(10, 8)
            self.encoder = nn.Sequential(nn.Linear(784 + 8, 64), nn.ReLU())
            self.mean, self.log_var = nn.Linear(64, 12), nn.Linear(64, 12)
            self.decoder = nn.Sequential(nn.Linear(12 + 8, 64), nn.ReLU(), nn.Linear(64, 784), nn.Sigmoid())

        def forward(self, x: Tensor, label: Tensor) -> dict[str, Tensor]:
            y = self.label(label)
            hidden = self.encoder(torch.cat([x.flatten(1), y], 1))
            mean, log_var = self.mean(hidden), self.log_var(hidden)
            z = mean + torch.randn_like(mean) * (log_var / 2).exp() if self.training else mean
            made = self.decoder(torch.cat([z, y], 1)).view_as(x)
            return {"made": made, "mean": mean, "log_var": log_var}

    return Vae()


@network("torch", "perceiver: learned queries read tokens", vectors(20, 12))
def _perceiver() -> nn.Module:
    class Perceiver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(6, 32))
            self.first = nn.Linear(12, 32)
            self.cross = nn.MultiheadAttention(32, 4, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
            self.out = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            latents = self.latents.expand(len(x), -1, -1)
            latents = latents + self.cross(latents, x, x, need_weights=False)[0]
            return self.out(self.layer(latents).mean(1))

    return Perceiver()


@network("torch", "N-BEATS: residual stacks with two outputs", vectors(24))
def _nbeats() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
            self.back, self.ahead = nn.Linear(32, 24), nn.Linear(32, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x)
            return self.back(x), self.ahead(x)

    class NBeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            forecast = x.new_zeros(len(x), 6)
            for block in self.blocks:
                back, ahead = block(x)
                x, forecast = x - back, forecast + ahead
            return forecast

    return NBeats()
