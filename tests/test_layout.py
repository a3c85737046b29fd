"""The shape of the package: which module may import which, and what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import featvis_func

PACKAGE = Path(featvis_func.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# What each module of the functional core may import from the package.
CORE: dict[str, set[str]] = {
    "types": set(),
    "random": {"types"},
    "color": {"types", "random"},
    "image": {"types", "random", "color", "image"},
    "transform": {"types", "random", "transform", "messages"},
    "objective": {"types", "random", "objective", "messages"},
    "optimizer": {"types", "random", "optimizer"},
}
# From the bottom up; a module imports from its own level and from those below.
LEVELS: tuple[set[str], ...] = (
    {*CORE, "animation", "files", "inductor", "layers", "memory", "messages", "numbers", "ops", "photographs"}
    | {"pictures", "redirect", "rewrites", "snapshots", "statistics", "weights", "winograd", "zoo"},
    {"models", "presets"},
    {"options"},
    {"capture"},
    {"export", "verification"},
    {"features"},
    {"fields", "scoring", "result"},
    {"step", "loggers"},
    {"execution"},
    {"slots"},
    {"renderer"},
    {"rendering"},
    {"accentuation", "examples", "sweep"},
    {"gallery"},
    {"arguments", "commands", "cli", "__main__"},
)


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "featvis_func" else [module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("featvis_func."))


def files_of(module: str) -> list[Path]:
    folder = PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


def level_of(module: str) -> int:
    levels = [i for i, level in enumerate(LEVELS) if module in level]
    assert levels, f"{module} stands on no level: give it one"
    return levels[0]


# Imports each module first, in a child of a process that has torch and of this package nothing; prints which failed.
# Not by multiprocessing's fork server: of that, a process has but one, and other tests say what it imports.
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


FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_types_and_random_alone(module: str) -> None:
    assert {name for path in files_of(module) for name in imported(path)} <= CORE[module]


@pytest.mark.parametrize("module", [*MODULES, *FOLDERS])
def test_imports_run_downwards(module: str) -> None:
    above = {other for path in files_of(module) for other in imported(path) if level_of(other) > level_of(module)} - {
        module
    }
    assert not above


def test_features_know_the_model_and_the_core_alone() -> None:
    assert set(imported(PACKAGE / "features.py")) <= {
        *CORE,
        "layers",
        "messages",
        "models",
        "capture",
        "export",
        "verification",
        "winograd",
    }


def test_models_know_messages_weights_and_the_zoo_alone() -> None:
    assert {other for path in files_of("models") for other in imported(path)} <= {
        "models",
        "messages",
        "weights",
        "zoo",
    }


def test_the_zoo_stands_alone() -> None:
    assert {other for path in files_of("zoo") for other in imported(path)} <= {"zoo"}


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
    assert not names & {*MODULES, *FOLDERS}


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


def test_libraries_that_not_everybody_has_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, featvis_func; featvis_func.load_model('texturenet'); featvis_func.render"
    code += "; featvis_func.wandb_logger; others = {'timm', 'transformers', 'ray', 'tensorboard', 'wandb'}"
    code += "; sys.exit(3 * any(name in sys.modules for name in others))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


IMPORTED = [*(module for module in MODULES if module != "__main__"), *FOLDERS]


@pytest.fixture(scope="module")
def not_first() -> list[str]:
    """The modules that cannot be imported first, or change something of torch."""
    command = [sys.executable, "-c", IMPORT_EACH, *IMPORTED]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


@pytest.mark.parametrize("module", IMPORTED)
def test_a_module_can_be_imported_first_and_draws_nothing(module: str, not_first: list[str]) -> None:
    """No cycle is hidden by the order of imports, and an import configures nothing of torch."""
    assert module not in not_first
