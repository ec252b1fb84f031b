"""Merged modules as files that run without this package."""

from __future__ import annotations

import pytest
import torch
from helpers.cli_user import LitNet

from lightning_zipit import MultiHeadModule, export
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.export import export_merged


class SeveralOutputs(LitNet):
    """A network that returns a dict with a tuple in it."""

    def forward(self, x):
        logits = self.net(x)
        return {"logits": logits, "more": (logits.softmax(1), None, logits * 2)}


def make_merged(model=LitNet, backbone="net"):
    torch.manual_seed(0)
    models = {"cats": model(4), "dogs": model(4)}
    return MultiHeadModule(models, backbone, example_input=torch.zeros(1, 1, 8, 8)).eval()


@pytest.fixture(scope="module")
def merged():
    return make_merged()


def run_pt2(file, x):
    return torch.export.load(file).module()(x)


def run_onnx(file, x):
    onnx, reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
    model = onnx.load(file)
    names = [output.name for output in model.graph.output]
    outputs = reference.ReferenceEvaluator(model).run(names, {"input": x.numpy()})
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}


FORMATS = pytest.mark.parametrize("run", [run_pt2, run_onnx], ids=["pt2", "onnx"])


def exported(merged, tmp_path, run, **arguments):
    if run is run_onnx:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    file = tmp_path / ("merged.onnx" if run is run_onnx else "merged.pt2")
    names = export_merged(merged, file, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    return file, names


@FORMATS
def test_a_file_computes_the_same_for_any_number_of_samples(merged, tmp_path, run):
    file, names = exported(merged, tmp_path, run)
    assert names == ["cats", "dogs"]
    for samples in (1, 5):
        x = torch.randn(samples, 1, 8, 8)
        outputs = run(file, x)
        assert list(outputs) == names
        torch.testing.assert_close(outputs, merged(x))


@FORMATS
def test_several_outputs_of_a_head_are_named_below_its_task(tmp_path, run):
    merged = make_merged(SeveralOutputs, "")
    file, names = exported(merged, tmp_path, run)
    assert names == [f"{task}.{key}" for task in ("cats", "dogs") for key in ("logits", "more.0", "more.2")]
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(run(file, x)["dogs.more.2"], merged(x, task="dogs")["more"][2])


def test_a_file_may_be_for_a_fixed_number_of_samples(merged, tmp_path):
    file, _ = exported(merged, tmp_path, run_pt2, batch_size=3)
    torch.testing.assert_close(run_pt2(file, x := torch.randn(3, 1, 8, 8)), merged(x))
    with pytest.raises(Exception, match="3"):
        run_pt2(file, torch.randn(4, 1, 8, 8))


def test_exporting_leaves_the_module_as_it_was(merged, tmp_path):
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    exported(merged, tmp_path, run_pt2)
    assert all(torch.equal(before[name], tensor) for name, tensor in merged.state_dict().items())
    assert not merged.training


def test_what_cannot_be_written_is_refused_and_nothing_is_left(merged, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"\.onnx or \.pt2"):
        export_merged(merged, tmp_path / "merged.tflite")
    with pytest.raises(ConfigurationError, match="does not exist"):
        export_merged(merged, tmp_path / "no" / "merged.pt2")
    with pytest.raises(ConfigurationError, match="example_input"):
        export_merged(MultiHeadModule({"cats": LitNet(), "dogs": LitNet()}, "net"), tmp_path / "merged.pt2")
    monkeypatch.setattr(export, "RequirementCache", lambda name: name == "onnx")
    with pytest.raises(ConfigurationError, match=r"onnxscript, which is not .*pip install 'lightning-zipit\[onnx\]'"):
        export_merged(merged, tmp_path / "merged.onnx")

    def fill_the_disk(program, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.export, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        export_merged(merged, tmp_path / "merged.pt2")
    assert not list(tmp_path.iterdir())


def test_a_network_that_torch_cannot_export_is_explained(merged, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Constraints violated (batch)")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ConfigurationError, match=r"--batch_size=1.*Constraints violated"):
        export_merged(merged, tmp_path / "merged.pt2")
