"""The package without ``featvis_func/cpu``: everything works as before, with the same results up to rounding."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import featvis_func

PACKAGE = Path(featvis_func.__file__).parent
BRANCH = """\
    if device_type == "cpu":
        from featvis_func import cpu

        return Specialization(*cpu.SPECIALIZATION)
"""
RENDER = """
    import sys
    import torch
    from torch import nn
    import featvis_func as fv

    torch.set_num_threads(1)
    compile, path = sys.argv[1] == "compiled", sys.argv[2]
    fastest = {"image": "pixel", "transforms": "none", "optimizer": "sgd"}  # to compile
    options = fastest if compile else {}
    torch.manual_seed(0)
    net = nn.Sequential(  # everything that `cpu` replaces
        nn.Conv2d(3, 32, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)
    )
    model = fv.load_model(net, size=48, mean=[0.5] * 3, std=[0.5] * 3)
    result = fv.render(model, "5", [0, 1], steps=2, compile=compile, precision="float32", **options)
    torch.save({"images": result.images, "scores": result.scores, "modules": sorted(sys.modules)}, path)
"""


def imported_names(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_cpu(name: str) -> bool:
    return name == "featvis_func.cpu" or name.startswith("featvis_func.cpu.")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_hardware_is_the_only_module_that_imports_cpu() -> None:
    importing = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE)
        if name.parts[0] == "cpu":
            continue
        tree = ast.parse(path.read_text())
        if name.name == "__init__.py" and len(name.parts) == 1:
            # Names for type checkers are not imported when the package runs.
            tree.body = [node for node in tree.body if not is_type_checking(node)]
        if any(map(is_cpu, imported_names(tree))):
            importing.add(name.as_posix())
    assert importing == {"backbone/hardware.py"}


def test_kept_memory_is_the_only_public_name_of_cpu() -> None:
    assert [(home, names) for home, names in featvis_func._HOMES.items() if home.split(".")[0] == "cpu"] == [
        ("cpu.malloc", ("kept_memory",))
    ]


def rendered(folder: Path, mode: str, path: Path) -> dict[str, Any]:
    """Render in a process that imports the package from a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    code = textwrap.dedent(RENDER)
    command = [sys.executable, "-c", code, mode, str(path)]
    process = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def without_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that has no ``cpu``."""
    folder = tmp_path_factory.mktemp("without_cpu")
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(copy / "cpu")
    hardware = copy / "backbone" / "hardware.py"
    source = hardware.read_text()
    assert source.count(BRANCH) == 1
    hardware.write_text(source.replace(BRANCH, ""))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_render_without_cpu_equals_the_package(mode: str, without_cpu: Path, tmp_path: Path) -> None:
    actual = rendered(without_cpu, mode, tmp_path / "actual.pt")
    expected = rendered(PACKAGE.parent, mode, tmp_path / "expected.pt")
    assert "featvis_func.cpu" in expected["modules"]
    assert not any(map(is_cpu, actual["modules"]))
    for name in ("images", "scores"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)
