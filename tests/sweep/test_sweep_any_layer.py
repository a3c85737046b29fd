"""Sweeps over tensors that are no module's output, over models that cannot be exported, and over layers that fail."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.cli import main as cli
from featvis_func.models import Model, load_model, loading
from featvis_func.sweep import dry_run, open_store, sweep, validate
from featvis_func.sweep.plan import select_layers

pytestmark = pytest.mark.usefixtures("one_thread")


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Net(nn.Module):
    """A convolution called twice, one whose number of calls depends on the images, and an operation."""

    def __init__(self, rounded: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv = nn.Conv2d(3, 3, 3)
            self.varying = nn.Conv2d(3, 4, 1)
        self.rounded = rounded

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x).tanh()) + 1
        if not self.rounded:
            return self.varying(x)
        return torch.cat([self.varying(Rounded.apply(image[None])) for image in x])  # type: ignore[arg-type]


def make(rounded: bool) -> Model:
    return load_model(Net(rounded).eval(), mean=(0, 0, 0), std=(1, 1, 1), size=10)


NAMES = ["conv#1", "conv", "conv<", "/tanh", "/add", "output"]


@pytest.mark.slow
def test_sweep_over_tensors_that_are_no_modules_output(tmp_path: Path) -> None:
    model = make(rounded=False)
    status = sweep(model, NAMES, out=tmp_path / "run", steps=2)
    assert status.complete
    store = open_store(tmp_path / "run")
    assert set(store.layers) == set(NAMES)
    assert validate(tmp_path / "run").sound
    for name in NAMES:
        expected = fv.render(model, name, [1, 2], steps=2, batch_size=3, progress=False)
        assert abs(store[name, 1].score - float(expected.scores[0])) < 1e-4
    assert sweep(model, NAMES, out=tmp_path / "run", steps=2).complete


def test_patterns_find_them_too() -> None:
    model = make(rounded=False)
    assert [layer.name for layer in select_layers(model, ["/*"])] == ["/tanh", "/add"]
    assert [layer.name for layer in select_layers(model, ["conv#*"])] == ["conv#1", "conv#2", "conv#1<"]
    assert [layer.name for layer in select_layers(model, ["*"])] == ["conv", "varying"]


def test_layer_that_cannot_be_rendered_is_one_failure_with_a_reason(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="runs with a forward hook"):
        status = sweep(make(rounded=True), ["conv", "varying"], out=tmp_path / "run", unit_size=2, steps=2)
    assert list(status.failed) == ["varying/00000-00001", "varying/00002-00003"]
    assert all("'varying' is called 3 times in one forward pass and 2 in another" in e for e in status.failed.values())
    assert status.done == 2
    assert open_store(tmp_path / "run")["conv", 2].image.shape == (3, 10, 10)


@pytest.mark.slow
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loading, "by_name", lambda name, *_, **__: make(rounded="round" in name))
    common = ["--steps", "2", "--device", "cpu"]
    assert cli.main(["layers", "net", "--all"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in NAMES)
    assert cli.main(["render", "net", "--layer", "conv#1", *common, "--out", str(tmp_path / "a")]) == 0
    assert "3 filters of conv#1, mean score" in capsys.readouterr().out
    assert cli.main(["render", "net", "--layer", "conv#3", *common, "--out", str(tmp_path / "b")]) == 2
    assert "layer 'conv#3': a forward pass calls 'conv' 2 times" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    arguments = ["sweep", "round", "--layers", "conv,varying", *common, "--out", str(tmp_path / "c")]
    with pytest.warns(UserWarning, match="runs with a forward hook"):
        assert cli.main(arguments) == 1
    assert "varying/00000-00003 failed: 'varying' is called 3 times" in capsys.readouterr().out
    assert dry_run(make(rounded=False), "output", steps=2).plans[0].filters == (0, 1, 2, 3)
