"""Merged modules as files that run without this package."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from helpers.cli_user import LitNet
from helpers.nets import settle, trainer
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_zipit import MultiHeadModule, ZipIt, export_merged
from lightning_zipit._lightning import export
from lightning_zipit.errors import ConfigurationError


class SeveralOutputs(LitNet):
    """A network that returns a dict with a tuple in it."""

    def forward(self, x):
        logits = self.net(x)
        return {"logits": logits, "more": (logits.softmax(1), None, logits * 2)}


@pytest.fixture(scope="module")
def merged():
    """Two modules that share their first convolution, and have one of their own each."""
    torch.manual_seed(0)
    models = {"cats": LitNet(4), "dogs": LitNet(4)}
    for model in models.values():
        settle(model.net, torch.randn(16, 1, 8, 8))
    return ZipIt(trainer()).merge(models, DataLoader(torch.randn(16, 1, 8, 8), 8), backbone="net", stop_at="stem")


@pytest.fixture(scope="module")
def files(merged, tmp_path_factory):
    """The merged module as a file of each format."""
    folder = tmp_path_factory.mktemp("exported")
    names = {suffix: export_merged(merged, folder / f"merged.{suffix}") for suffix in ("pt2", "onnx")}
    assert names == {"pt2": ["cats", "dogs"], "onnx": ["cats", "dogs"]}
    files = {suffix: folder / f"merged.{suffix}" for suffix in names}
    assert {*folder.iterdir()} == {*files.values()}
    return files


def run_pt2(file, x):
    return torch.export.load(file).module()(x)


def run_onnx(file, x):
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"input": x.numpy()})), strict=True))


FORMATS = pytest.mark.parametrize(("run", "suffix"), [(run_pt2, "pt2"), (run_onnx, "onnx")], ids=["pt2", "onnx"])


@FORMATS
@pytest.mark.parametrize("samples", [1, 5])
def test_a_file_computes_the_same_for_any_number_of_samples(merged, files, run, suffix, samples):
    outputs = run(files[suffix], x := torch.randn(samples, 1, 8, 8))
    assert list(outputs) == ["cats", "dogs"]
    torch.testing.assert_close(outputs, merged(x), atol=1e-5, rtol=1e-5)


@FORMATS
def test_several_outputs_of_a_head_are_named_below_its_task(tmp_path, run, suffix):
    models = {"cats": SeveralOutputs(4), "dogs": SeveralOutputs(4)}
    merged = MultiHeadModule(models, example_input=torch.zeros(1, 1, 8, 8)).eval()
    names = export_merged(merged, tmp_path / f"merged.{suffix}")
    assert names == [f"{task}.{key}" for task in ("cats", "dogs") for key in ("logits", "more.0", "more.2")]
    x = torch.randn(3, 1, 8, 8)
    outputs = run(tmp_path / f"merged.{suffix}", x)
    torch.testing.assert_close(outputs["dogs.more.2"], merged(x, task="dogs")["more"][2])


def test_the_trunk_is_paid_for_once_by_all_tasks(merged):
    def flops(network, *inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*inputs)
        return counter.get_total_flops()

    x = torch.randn(1, 1, 8, 8)
    shared = merged.trunk(x)
    trunk, heads = flops(merged.trunk, x), [flops(head, *shared) for head in merged.heads.values()]
    assert flops(merged, x) == trunk + sum(heads) == merged.report.merged.flops
    assert [flops(lambda x, task=task: merged(x, task=task), x) for task in merged.tasks] == [trunk + h for h in heads]


def test_a_file_has_the_layers_of_the_trunk_once(merged, files):
    def convolutions(network):
        return sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())

    program, graph = torch.export.load(files["pt2"]).graph, onnx.load(files["onnx"]).graph
    in_pt2 = sum("conv2d" in str(node.target) for node in program.nodes if node.op == "call_function")
    in_onnx = sum(node.op_type == "Conv" for node in graph.node)
    trunk, heads = convolutions(merged.trunk), convolutions(merged.heads)
    assert (trunk, heads) == (1, 2) and in_pt2 == in_onnx == trunk + heads


def test_a_file_may_be_for_a_fixed_number_of_samples(merged, tmp_path):
    export_merged(merged, tmp_path / "merged.pt2", batch_size=3)
    torch.testing.assert_close(run_pt2(tmp_path / "merged.pt2", x := torch.randn(3, 1, 8, 8)), merged(x))
    with pytest.raises(Exception, match="3"):
        run_pt2(tmp_path / "merged.pt2", torch.randn(4, 1, 8, 8))


def test_weights_beyond_what_onnx_holds_are_in_a_file_beside_it(merged, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    export_merged(merged, tmp_path / "merged.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.onnx", "merged.onnx.data"]
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(run_onnx(tmp_path / "merged.onnx", x), merged(x), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_written_is_refused_and_what_was_there_stays(merged, tmp_path, monkeypatch):
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

    (tmp_path / "merged.pt2").write_bytes(b"an earlier one")
    monkeypatch.setattr(torch.export, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        export_merged(merged, tmp_path / "merged.pt2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an earlier one"]


def test_a_network_that_torch_cannot_export_is_explained(merged, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Constraints violated (batch)")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ConfigurationError, match=r"--batch_size=1.*Constraints violated"):
        export_merged(merged, tmp_path / "merged.pt2")
