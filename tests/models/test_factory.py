"""Models made by a function of the user's, and objects that are not models."""

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from featvis_func.models import fingerprint, load_model

NETS = """
import torch
from torch import nn

import featvis_func as fv

drawn = torch.rand(1)


class Net(nn.Sequential):
    def __init__(self, channels=3):
        super().__init__(nn.Conv2d(channels, 4, 3), nn.Dropout())


def make():
    return Net()


def with_input():
    return fv.load_model(Net(1), mean=[0.5], std=[0.25], size=12)


def wrapped():
    return nn.DataParallel(Net())


def needs(width, depth=3):
    return Net(width)


def fails():
    raise RuntimeError("no weights\\nhere")


def nothing():
    pass


def states():
    return Net().state_dict()


net = Net()
number = 7
"""
STATED: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 16}


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path with ``own_nets.py`` and the package ``own_package``; forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "code"
    (folder / "own_package").mkdir(parents=True)
    (folder / "own_nets.py").write_text(NETS)
    (folder / "own_package" / "__init__.py").touch()
    (folder / "own_package" / "small.py").write_text("from own_package.parts import Net\n\nmake = Net\n")
    (folder / "own_package" / "parts.py").write_text("from own_nets import Net\n")
    (folder / "broken_nets.py").write_text("import there_is_no_such_package\n")
    (folder / "script_nets.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "torch.py").write_text(NETS)
    (folder / "own.nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith(("own", "broken_nets", "script_nets")):
            del sys.modules[name]


@pytest.fixture
def importable(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(nets))


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("spec", ["own_nets:make", "own_nets:Net", "own_package.small:make", "own_nets:wrapped"])
def test_a_function_of_a_module_makes_the_model(spec: str) -> None:
    state = torch.get_rng_state()
    models = [load_model(spec, **STATED) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    model = models[0]
    assert (model.name, model.size, model.assumed, type(model.module).__name__) == (spec, (16, 16), (), "Net")
    assert fingerprint(models[0].module) == fingerprint(models[1].module)
    assert models[0].module is not models[1].module


@pytest.mark.usefixtures("importable")
def test_a_function_may_return_a_model() -> None:
    model = load_model("own_nets:with_input")
    assert (model.name, model.mean, model.std, model.size) == ("own_nets:with_input", (0.5,), (0.25,), (12, 12))
    assert load_model("own_nets:with_input", size=9).size == (9, 9)


@pytest.mark.usefixtures("importable")
def test_what_is_assumed_about_its_module_is_said() -> None:
    with pytest.warns(UserWarning, match="own_nets:make does not say how its input is normalised"):
        model = load_model("own_nets:make")
    assert model.assumed == ("size", "normalisation")


@pytest.mark.usefixtures("importable")
def test_weights_may_come_from_a_file(tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in load_model("own_nets:make", **STATED).module.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    model = load_model("own_nets:make", weights=tmp_path / "w.pth", **STATED)
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())


@pytest.mark.parametrize("place", ["code/own_nets.py", "./code/own_nets.py", "{tmp_path}/code/own_nets.py"])
def test_a_file_is_named_by_its_path(place: str, tmp_path: Path) -> None:
    spec = f"{place.format(tmp_path=tmp_path)}:make"
    assert load_model(spec, **STATED).name == spec
    assert load_model("code/own_nets.py:with_input").size == (12, 12)


def test_files_import_their_neighbours(nets: Path) -> None:
    (nets / "own_main.py").write_text(
        "import own_nets\n\ndef make():\n    from own_package import parts\n    return parts.Net()\n"
    )
    assert type(load_model("code/own_main.py:make", **STATED).module).__name__ == "Net"


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_nets:make", r"unknown model 'no_such_nets:make'; expected .* \(there is no module 'no_such_nets' on"),
        ("own_package.smal:make", r"there is no module 'own_package\.smal' on"),
        ("own_nets.small:make", r"there is no module 'own_nets\.small' on"),
        ("timmm:resnet18", r"there is no module 'timmm' .*\); did you mean 'timm'\?"),
        ("own_nets:mak", r"own_nets has no 'mak'; did you mean .*'make'"),
        ("own_nets:net", r"'net' of own_nets is Net\(.* \(a Net\); expected a function without arguments"),
        ("own_nets:number", r"'number' of own_nets is 7 \(an int\); expected a function"),
        ("own_nets:needs", r"needs of own_nets needs width, and is called without arguments"),
        ("own_nets:fails", r"fails of own_nets raises RuntimeError: no weights$"),
        ("own_nets:nothing", r"nothing of own_nets returns None \(a NoneType\); expected an nn\.Module or a Model"),
        ("own_nets:states", r"states of own_nets returns a state dict, which holds 2 tensors"),
        ("broken_nets:make", r"importing broken_nets raises ModuleNotFoundError: No module named 'there_is_no"),
        ("script_nets:make", r"importing script_nets raises SystemExit: 3"),
        ("code/absent.py:make", r"no file 'code/absent\.py'"),
        ("code:make", r"there is no module 'code'|code has no 'make'"),
        ("code/torch.py:make", r"file 'code/torch\.py' cannot be imported as 'torch', .* another module; rename it"),
        ("code/own.nets.py:make", r"cannot be imported as 'own\.nets', .*; rename it"),
        ("code/broken_nets.py:make", r"importing broken_nets raises ModuleNotFoundError"),
        ("own_nets:make()", r"unknown model 'own_nets:make\(\)'; expected"),
        ("own-nets:make", r"unknown model 'own-nets:make'; expected .*'package\.module:function'"),
        (":make", r"unknown model ':make'; expected"),
    ],
)
def test_errors_name_what_was_given(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(spec)
    assert "\n" not in str(raised.value)


def test_two_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own_twin.py").write_text(NETS)
    assert load_model("one/own_twin.py:make", **STATED).channels == 3
    with pytest.raises(ValueError, match=r"'two/own_twin\.py' cannot be imported as 'own_twin', .* rename it"):
        load_model("two/own_twin.py:make", **STATED)


@pytest.mark.slow
def test_nothing_else_imports_code(nets: Path) -> None:
    """Neither a module in the current folder, nor a name of another form."""
    script = (
        "import sys, featvis_func as fv\nfor name in ('own_nets', 'own_nets.make', 'own_nets/make', 'own_nets:'):\n"
    )
    script += "    try: fv.load_model(name)\n    except ValueError: pass\nsys.exit('own_nets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=nets.parent, check=False).returncode == 0


# --- objects that are not models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torchvision.models.squeezenet1_1().state_dict(),
            r"got a state dict, which holds 52 tensors but no architecture",
        ),
        ({"model": {"w": torch.zeros(1)}, "epoch": 3}, r"got a checkpoint, which holds 1 tensor but no architecture"),
        (OrderedDict(w=torch.zeros(9)), r"got a state dict, .* load_state_dict, .*weights='file\.pth'"),
        ({}, r"got \{\} \(a dict\)$"),
        (torch.zeros(1, 3, 500, 500), r"got a Tensor of shape \(1, 3, 500, 500\)$"),
        (None, r"got None \(a NoneType\)$"),
        (nn.Conv2d, r"got the class Conv2d: give an instance, Conv2d\(\.\.\.\)$"),
        ([nn.Conv2d(3, 400, 3)] * 50, r"got \[Conv2d.* \(a list\)$"),
        (Path("net.pth"), r"got PosixPath\('net\.pth'\) \(a PosixPath\)$"),
        (type("Rude", (), {"__repr__": lambda self: 1 / 0})(), r"got .*Rude"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_objects_that_are_not_models_are_described_briefly(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(given)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


class Later(nn.Module):
    """Has a buffer without values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(3, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.LazyConv2d(4, 3)),
            r"parameter '0\.weight' of Sequential is not initialised \(its layer is a Lazy",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()),
            r"parameter '1\.weight' of Sequential is not initialised",
        ),
        (nn.Sequential(nn.LazyBatchNorm2d(affine=False)), r"buffer '0\.running_mean' of Sequential is not initialised"),
        (
            nn.Conv2d(3, 4, 3, device="meta"),
            r"parameter 'weight' of Conv2d is on the meta device .*net\.to_empty\(device",
        ),
        (nn.Sequential(Later()), r"buffer '0\.index' of Sequential is on the meta device"),
    ],
    ids=lambda value: "",
)
def test_modules_without_values_are_rejected(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(module, **STATED)
    assert "\n" not in str(raised.value)
