"""The layout of the package: which room may import which, and what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import featvis_func

PACKAGE = Path(featvis_func.__file__).parent

# The sentence that orders the house: each room imports only leftwards, plus the rooms that everyone may use.
SENTENCE = "core -> backbone -> engine -> rendering -> sweep, dataset -> gallery -> cli"
FOR_EVERYONE = {"models", "io", "validation"}
CORE = {"types", "random", "color", "tree", "constants", "image", "transform", "objective", "optimizer"}
FLOORS = [{*CORE} if floor == "core" else set(floor.split(", ")) for floor in SENTENCE.split(" -> ")]
ROOMS = sorted(
    {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
)
ROOMS = [room for room in ROOMS if not room.startswith("__")]


def allowed(room: str) -> set[str]:
    """The other rooms that a room may import."""
    if room == "validation":
        return set()
    if room in CORE:  # one image, pure: the shared types and generators, never each other
        return {"types", "random", "tree", "constants", "validation"} | ({"color"} if room == "image" else set())
    if room == "zoo":
        return {"validation"}
    if room == "models":
        return {"validation", "io", "zoo"}
    if room == "io":
        return {"validation"}
    if room == "cpu":  # which only backbone/hardware.py imports
        return {"types"}
    (floor,) = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    left = set[str]().union(*FLOORS[:floor]) | FOR_EVERYONE
    return left | ({"cpu"} if room == "backbone" else set())


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, at its top or inside a function, such as ``engine.step``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "featvis_func" else [module]
        else:
            continue
        yield from (name.removeprefix("featvis_func.") for name in names if name.startswith("featvis_func."))


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_imports_only_leftwards(room: str) -> None:
    others = {name.split(".")[0] for path in files_of(room) for name in imported(path)} - {room}
    assert others <= allowed(room), f"{room} imports {sorted(others - allowed(room))}; the order is: {SENTENCE}"


@pytest.mark.slow
def test_one_module_imports_the_cpu_folder() -> None:
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for name in imported(path)
        if name.split(".")[0] == "cpu" and not path.is_relative_to(PACKAGE / "cpu")
    }
    assert importing - {"__init__.py"} == {"backbone/hardware.py"}


def test_one_module_imports_the_private_pytree() -> None:
    naming = [path.name for path in PACKAGE.rglob("*.py") if "_pytree" in path.read_text(encoding="utf-8")]
    assert naming == ["tree.py"]


def test_the_modules_of_a_room_import_each_other_without_a_cycle() -> None:
    arrows = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {
            name for name in imported(path) if (PACKAGE / f"{name.replace('.', '/')}.py").exists()
        }
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__init__"
    }
    assert list(TopologicalSorter(arrows).static_order())  # raises CycleError


def test_tests_mirror_the_rooms() -> None:
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    assert folders <= {*ROOMS, "core", "benchmarks"}
    rooms_with_folders = {room for room in ROOMS if (PACKAGE / room).is_dir()} - CORE - {"zoo"}
    assert rooms_with_folders <= folders


# Imports each module first, each in a child of a process that has imported torch but nothing of this package; prints
# those that failed. A fork server would not do: a process has only one, and other tests choose what it imports.
IMPORT_EACH = """
import os, sys, traceback, warnings
from importlib import import_module
import torch, torchvision
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("error")
            before = torch.initial_seed()
            import_module("featvis_func." + module)
            assert torch.initial_seed() == torch.default_generator.initial_seed() == before
            assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(module)
"""


def public_names() -> list[tuple[str, str]]:
    """(name, module that holds it) of each public name, from the imports that a type checker reads."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    return [
        (alias.asname or alias.name, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("featvis_func")
        for alias in node.names
    ]


@pytest.mark.parametrize(("name", "module"), public_names())
def test_public_names_are_what_the_type_checker_is_told(name: str, module: str) -> None:
    home = import_module(module)
    expected = import_module(f"{module}.{name}") if module == "featvis_func" else getattr(home, name)
    assert getattr(featvis_func, name) is expected
    assert name in dir(featvis_func)


def test_no_public_name_hides_a_module() -> None:
    names = {name for name, module in public_names() if module != "featvis_func"}
    assert not names & set(ROOMS)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'featvis_func' has no attribute 'lucid'"):
        _ = featvis_func.lucid


@pytest.mark.parametrize(
    "code",
    [
        "import featvis_func",
        "import featvis_func.cli.main",
        "from featvis_func.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from featvis_func.cli.main import main\ntry: main(['render', '--help'])\nexcept SystemExit: pass",
    ],
    ids=["package", "cli", "help", "help of render"],
)
def test_torch_is_not_imported_for(code: str) -> None:
    code += "\nimport sys; sys.exit(3 * any(heavy in sys.modules for heavy in ('torch', 'torchvision', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.slow
def test_optional_libraries_are_imported_only_when_used() -> None:
    code = "import sys, featvis_func; featvis_func.load_model('texturenet'); featvis_func.render"
    code += "; featvis_func.wandb_logger; others = {'timm', 'transformers', 'ray', 'tensorboard', 'wandb'}"
    code += "; sys.exit(3 * any(name in sys.modules for name in others))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__main__.py",) and path.parent.name != "assets" and path != PACKAGE / "__init__.py"
)


@pytest.fixture(scope="module")
def not_first() -> list[str]:
    """The modules whose import fails if it comes first, or changes a setting of torch."""
    command = [sys.executable, "-c", IMPORT_EACH, *MODULES]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_imported_first_and_changes_no_setting_of_torch(module: str, not_first: list[str]) -> None:
    """No cycle is hidden by the order of imports."""
    assert module not in not_first
