"""Modules as public projects write them: merged with its copy, a module validates as it does alone."""

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MultilabelF1Score
from torchmetrics.regression import MeanSquaredError

from lightning_zipit import ZipIt
from lightning_zipit.matchers import Average

G = torch.Generator().manual_seed(3)
IMAGES = torch.randint(0, 256, (12, 3, 8, 8), generator=G).float()
MASKS = torch.randint(0, 3, (12, 8, 8), generator=G)
LABELS = torch.randint(0, 3, (12,), generator=G)
ROWS = torch.randn(12, 6, generator=G)
TARGETS = torch.randn(12, generator=G)


def conv(outputs=3, pooled=True):
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)] if pooled else [nn.Conv2d(8, outputs, 1)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), *end)


def dense(outputs=3, inputs=6):
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))


def loaded(*values, collate=None):
    return DataLoader(list(zip(*values, strict=True)), 4, collate_fn=collate)


def dicts(**values):
    return DataLoader([dict(zip(values, each, strict=True)) for each in zip(*values.values(), strict=True)], 4)


class Segmentation(LightningModule):
    """Torchgeo: dicts, augmentation on the device by one's own hook, cloned metric collections, losses by name."""

    data = dicts(image=IMAGES, mask=MASKS, crs=["EPSG:4326"] * 12)

    def __init__(self, loss: str = "ce"):
        super().__init__()
        self.save_hyperparameters()
        self.model = conv(pooled=False)
        self.criterion = {"ce": nn.CrossEntropyLoss(ignore_index=2)}[self.hparams["loss"]]
        metrics = MetricCollection([MulticlassAccuracy(3, ignore_index=2)])
        self.train_metrics, self.val_metrics = metrics.clone(prefix="train_"), metrics.clone(prefix="val_")

    backbone = "model"

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer is not None and (self.trainer.validating or self.trainer.predicting):
            batch["image"] = batch["image"] / 255
        return batch

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch["image"], batch["mask"]
        y_hat = self(x)
        self.log("val_loss", self.criterion(y_hat, y), batch_size=x.shape[0])
        self.val_metrics(y_hat.argmax(1), y)
        self.log_dict(self.val_metrics, batch_size=x.shape[0])
        if batch_idx < 10 and hasattr(self.trainer, "datamodule") and self.logger is not None:
            self.logger.experiment.add_figure("image", None)


@dataclass
class Item:
    """Anomalib: a batch of one's own that a step fills in."""

    image: torch.Tensor
    gt_label: torch.Tensor
    pred_score: torch.Tensor | None = None

    def update(self, **values):
        for name, value in values.items():
            setattr(self, name, value)
        return self


Prediction = namedtuple("Prediction", ["pred_score", "anomaly_map"])


class Anomaly(LightningModule):
    """Anomalib: dataclasses as batches, a named tuple as output, metrics in a hook after the step."""

    data = loaded(IMAGES, LABELS, collate=lambda items: Item(*map(torch.stack, zip(*items, strict=True))))
    backbone = "model"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv(3, pooled=False)

        def forward(self, x):
            maps = self.net(x)
            return Prediction(maps.amax((2, 3)), maps) if not self.training else maps

    def __init__(self):
        super().__init__()
        self.model, self.mean = self.Model(), MeanMetric()

    def validation_step(self, batch, *args, **kwargs):
        return batch.update(**self.model(batch.image)._asdict())

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.mean.update(outputs.pred_score[:, 0])

    def on_validation_epoch_end(self):
        self.log("score", self.mean.compute())
        self.mean.reset()


class Hydra(LightningModule):
    """lightning-hydra-template: network and optimizers as arguments, compiled in `setup`, best metrics in a hook."""

    data = loaded(ROWS, LABELS)
    backbone = "net"

    def __init__(self, net: nn.Module | None = None, optimizer: Callable = torch.optim.Adam, compile: bool = True):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net, self.criterion = net or dense(), nn.CrossEntropyLoss()
        self.val_acc, self.val_loss, self.val_acc_best = MulticlassAccuracy(3), MeanMetric(), MeanMetric()

    def setup(self, stage):
        if self.hparams.compile and stage == "validate":
            self.net = torch.compile(self.net, backend="eager")

    def model_step(self, batch):
        x, y = batch
        logits = self.net(x)
        return self.criterion(logits, y), logits.argmax(1), y

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)


class Regression(LightningModule):
    """COMET: dicts of keyword arguments beside targets, a layer that is chosen by an attribute, one output."""

    data = DataLoader(
        list(zip(ROWS, TARGETS, strict=True)),
        4,
        collate_fn=lambda items: (
            {"src": torch.stack([x for x, _ in items])},
            {"score": torch.stack([y for _, y in items])},
        ),
    )
    backbone = "estimator"

    def __init__(self):
        super().__init__()
        self.estimator, self.loss = dense(1, 12), nn.MSELoss()

    def forward(self, src, **kwargs):
        return {"score": self.estimator(torch.cat([src, src.square()], 1)).view(-1)}

    def validation_step(self, batch, batch_nb):
        batch_input, batch_target = batch
        self.log("val_loss", self.loss(self.forward(**batch_input)["score"], batch_target["score"]), on_epoch=True)


class Graph:
    """Chemprop: a container of tensors with methods, that is moved by its own `to`."""

    def __init__(self, nodes, batch):
        self.nodes, self.batch = nodes, batch

    def to(self, device, non_blocking=False):
        return Graph(self.nodes.to(device), self.batch.to(device))

    def __len__(self):
        return int(self.batch.max()) + 1


class TrainingBatch(NamedTuple):
    graph: Graph
    extra: torch.Tensor | None
    targets: torch.Tensor
    limits: None = None


class Molecules(LightningModule):
    """Chemprop: a graph in a named tuple; message passing and predictor are the backbone on tensors."""

    data = DataLoader(
        list(zip(ROWS, TARGETS, strict=True)),
        4,
        collate_fn=lambda items: TrainingBatch(
            Graph(torch.cat([x.view(2, 3) for x, _ in items]), torch.arange(len(items)).repeat_interleave(2)),
            None,
            torch.stack([y for _, y in items]),
        ),
    )
    backbone = "predictor"

    def __init__(self):
        super().__init__()
        self.embed, self.predictor = nn.Linear(3, 6), dense(1)
        self.metrics = nn.ModuleList([MeanSquaredError(), MeanMetric()])

    def fingerprint(self, graph, extra):
        features = self.embed(graph.nodes)
        return torch.zeros(len(graph), 6).index_add_(0, graph.batch, features)

    def validation_step(self, batch, batch_idx=0):
        graph, extra, targets, *_ = batch
        preds = self.predictor(self.fingerprint(graph, extra)).squeeze(1)
        self.metrics[0](preds, targets)
        self.log("val_mse", self.metrics[0], batch_size=len(batch[0]))


class Forecast(LightningModule):
    """pytorch-forecasting: (x, y) of a dict and a tuple, the whole forward takes the dict and returns a named tuple."""

    data = DataLoader(
        list(zip(ROWS, TARGETS, strict=True)),
        4,
        collate_fn=lambda items: (
            {"encoder_cont": torch.stack([x for x, _ in items]), "scale": torch.ones(len(items), 1) * 2},
            (torch.stack([y for _, y in items]), None),
        ),
    )
    backbone = ""

    def __init__(self):
        super().__init__()
        self.net, self.loss = dense(1), nn.L1Loss()

    def forward(self, x: dict[str, torch.Tensor]) -> Any:
        prediction = self.net(x["encoder_cont"]) * x["scale"]
        return namedtuple("Output", ["prediction"])(prediction=prediction)

    def validation_step(self, batch, batch_idx):
        x, (y, _) = batch
        self.log("val_loss", self.loss(self(x).prediction[:, 0], y), batch_size=len(y))


class Sample(NamedTuple):
    image: torch.Tensor
    mean: torch.Tensor
    fname: list[str]
    slice_num: torch.Tensor
    target: torch.Tensor


class MRI(LightningModule):
    """fastMRI: named tuples with names of files, an axis added around the network, results collected over batches."""

    data = DataLoader(
        [Sample(x.mean(0), x.mean(), f"file{n % 3}", torch.tensor(n), x[0] / 9) for n, x in enumerate(IMAGES / 255)], 4
    )
    backbone = "unet"

    def __init__(self):
        super().__init__()
        self.unet = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        )
        self.validation_step_outputs = []

    def forward(self, image):
        return self.unet(image.unsqueeze(1)).squeeze(1)

    def validation_step(self, batch, batch_idx):
        mean = batch.mean[:, None, None]
        output = self(batch.image - mean) + mean
        done = {"fname": batch.fname, "error": (output - batch.target).square().mean((1, 2))}
        self.validation_step_outputs.append(done)
        return done

    def on_validation_epoch_end(self):
        by_file = {}
        for done in self.validation_step_outputs:
            for name, error in zip(done["fname"], done["error"], strict=True):
                by_file.setdefault(name, []).append(error)
        self.validation_step_outputs.clear()
        self.log("worst", max(torch.stack(errors).mean() for errors in by_file.values()))


class Pose(LightningModule):
    """lightning-pose: a backbone, an upsampling head, losses from a factory of dicts, and heatmaps to keypoints."""

    data = dicts(images=IMAGES, keypoints=torch.rand(12, 4, generator=G), idxs=torch.arange(12))
    backbone = "net"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = conv(8, pooled=False)
            self.upsampling_layers = nn.Sequential(nn.PixelShuffle(2), nn.ConvTranspose2d(2, 2, 3, padding=1))

        def forward(self, images):
            return self.upsampling_layers(self.backbone(images)).flatten(2).softmax(2).unflatten(2, (16, 16))

    def __init__(self):
        super().__init__()
        self.net = self.Net()

    def get_loss_inputs_labeled(self, batch):
        heatmaps = self.net.forward(batch["images"])
        grid = torch.linspace(0, 1, 16)
        points = torch.stack([(heatmaps.sum(2) * grid).sum(2), (heatmaps.sum(3) * grid).sum(2)], 2)
        return {"predicted": points.flatten(1), "targets": batch["keypoints"]}

    def evaluate_labeled(self, batch, stage=None):
        given = self.get_loss_inputs_labeled(batch)
        self.log(f"{stage}_loss", (given["predicted"] - given["targets"]).square().mean(), batch_size=4)

    def validation_step(self, batch_dict, batch_idx):
        self.evaluate_labeled(batch_dict, "val")


class Detector(LightningModule):
    """YOLO: targets of several lengths in a list, a forward with another output in training, anchors in a buffer."""

    data = loaded(
        IMAGES,
        [torch.rand(1 + n % 3, 5, generator=G) for n in range(12)],
        collate=lambda items: (
            torch.stack([x for x, _ in items]),
            [t for _, t in items],
            [x.shape[1:] for x, _ in items],
        ),
    )
    backbone = "model"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = conv(5, pooled=False)
            self.register_buffer("grid", torch.arange(8.0).repeat(8, 1)[None, None], persistent=False)

        def forward(self, x):
            y = self.layers(x)
            return y if self.training else (torch.cat([y[:, :1].sigmoid() + self.grid, y[:, 1:]], 1).flatten(2), [y])

    def __init__(self):
        super().__init__()
        self.model = self.Model()

    def validation_step(self, batch, batch_idx):
        images, targets, _ = batch
        boxes, (raw,) = self.model(images / 255)
        self.log("found", boxes.amax(2).mean() + len(targets) + raw.mean(), batch_size=len(images))


class Speech(LightningModule):
    """pyannote: what the task is stands beside the network, and its last activation is made in `setup`."""

    data = dicts(X=ROWS, y=(ROWS[:, :3] > 0).float())
    backbone = "linear"

    def __init__(self):
        super().__init__()
        self.linear, self.activation = dense(), None
        self.specifications = {"problem": "multi_label", "classes": ["a", "b", "c"]}
        self.validation_metric = MultilabelF1Score(3)

    def setup(self, stage=None):
        if self.activation is None:
            self.activation = nn.Sigmoid()

    def forward(self, waveforms):
        return self.linear(waveforms) if self.activation is None else self.activation(self.linear(waveforms))

    def validation_step(self, batch, batch_idx: int):
        self.validation_metric(self(batch["X"]), batch["y"].long())
        self.log("f1", self.validation_metric, on_epoch=True)


class Binary(LightningModule):
    """One output for yes or no, with the weight of the positive class in the loss."""

    data = loaded(ROWS, (TARGETS > 0).float())
    backbone = "net"

    def __init__(self):
        super().__init__()
        self.net, self.accuracy = dense(1), BinaryAccuracy()
        self.loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0]))

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])[:, 0]
        self.accuracy(logits.sigmoid(), batch[1])
        self.log_dict({"loss": self.loss(logits, batch[1]), "acc": self.accuracy})


class Contrastive(LightningModule):
    """Two views in one batch, a projection of the concatenated features, a loss over the whole batch."""

    data = loaded(ROWS, ROWS.flip(0))
    backbone = "encoder"

    def __init__(self):
        super().__init__()
        self.encoder, self.temperature = dense(4), nn.Parameter(torch.tensor(0.5))

    def validation_step(self, batch, batch_idx):
        z = nn.functional.normalize(self.encoder(torch.cat(batch)), dim=1)
        similarity = z @ z.T / self.temperature
        self.log("nce", similarity.logsumexp(1).mean() - similarity.diagonal(4).mean())


class Ensembled(LightningModule):
    """Averages over flips in its step, under `torch.no_grad` and autocast of its own."""

    data = loaded(IMAGES / 255, LABELS)
    backbone = "net"

    def __init__(self):
        super().__init__()
        self.net, self.accuracy = conv(), MulticlassAccuracy(3)

    @torch.no_grad()
    def validation_step(self, batch, batch_idx):
        x, y = batch
        with torch.autocast("cpu", enabled=False):
            out = torch.stack([self.net(each) for each in (x, x.flip(2), x.flip(3))]).mean(0)
        self.accuracy.update(out, y)
        self.log("acc", self.accuracy)
        self.log("mean", out.mean())


class Dense(LightningModule):
    """What the following change."""

    data = loaded(ROWS, LABELS)
    backbone = "net"

    def __init__(self):
        super().__init__()
        self.net, self.accuracy = dense(), MulticlassAccuracy(3)

    def validation_step(self, batch, batch_idx):
        out = self.net(batch[0])
        self.log("loss", nn.functional.cross_entropy(out, batch[1]))
        return out


class Mixup(Dense):
    """Has random numbers in its step, with a seed for each batch, and restores the state in a hook."""

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.state = torch.get_rng_state()
        torch.manual_seed(batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step((batch[0] + torch.rand(()), batch[1]), batch_idx)

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        torch.set_rng_state(self.state)


class Delegating(Dense):
    """Has its steps in a helper object that refers back to the module."""

    class Helper:
        def __init__(self, owner):
            self.owner = owner

        def run(self, batch):
            return Dense.validation_step(self.owner, batch, 0)

    def __init__(self):
        super().__init__()
        self.helper = self.Helper(self)

    def validation_step(self, batch, batch_idx):
        return self.helper.run(batch)


class Listed(Dense):
    """Keeps a second reference to its network in a plain list, as COMET and EMA teachers do."""

    def __init__(self):
        super().__init__()
        self.nets = [self.net]

    def validation_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self.nets[0](batch[0]), batch[1]))


class Property(Dense):
    """Reaches its network through a property of another name, and reports its size."""

    @property
    def encoder(self):
        return self.net

    def validation_step(self, batch, batch_idx):
        out = self.encoder(batch[0]) * len(list(self.encoder))
        self.log("loss", nn.functional.cross_entropy(out, batch[1]))


class Wrapped(Dense):
    """Calls its network by `torch.utils.checkpoint`, with hooks that look at features."""

    def validation_step(self, batch, batch_idx):
        out = torch.utils.checkpoint.checkpoint(self.net, batch[0], use_reentrant=False)
        self.log("loss", nn.functional.cross_entropy(out, batch[1]))


class Iterating(Dense):
    """Takes the iterator of its loader."""

    def validation_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), batch_size=4)


SITUATIONS = [
    *(Segmentation, Anomaly, Hydra, Regression, Molecules, Forecast, MRI, Pose, Detector, Speech, Binary),
    *(Contrastive, Ensembled, Mixup, Delegating, Listed, Property, Wrapped, Iterating),
]


@pytest.mark.parametrize("kind", SITUATIONS, ids=lambda kind: kind.__name__)
def test_a_module_merged_with_its_copy_validates_as_alone(kind):
    torch.manual_seed(0)
    source = kind().eval()
    expected = trainer().validate(copy.deepcopy(source), kind.data, verbose=False)[0]
    assert expected
    how = {"matcher": Average(), "refine": None, "backbone": kind.backbone}
    merged = ZipIt(trainer()).merge({"a": source, "b": copy.deepcopy(source)}, kind.data, **how)
    logged = trainer().validate(merged, [kind.data, kind.data], verbose=False)
    found = {name: value for each in logged for name, value in each.items()}
    assert found == pytest.approx(
        {f"{task}/{name}": each for task in "ab" for name, each in expected.items()}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "metric"), [(Binary, "loss"), (Speech, "f1"), (Regression, "val_loss"), (Contrastive, "nce")]
)
def test_a_sweep_ranks_by_any_metric_that_is_logged(kind, metric, tmp_path):
    torch.manual_seed(0)
    source = kind().eval()
    models = {"a": source, "b": copy.deepcopy(source)}
    result = ZipIt(trainer()).sweep(
        models,
        kind.data,
        val_dataloaders=[kind.data] * 2,
        backbone=kind.backbone,
        metric=metric,
        mode="min",
        matcher=Average(),
        refine=[None, "batch_norm"],
        results=tmp_path / "sweep.csv",
    )
    assert result.best.metrics[metric] == pytest.approx(result.ensemble.metrics[metric], rel=1e-4)
    assert not [row.error for row in result.rows if row.error]
