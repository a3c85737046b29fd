"""Models made by a function of the user's, named as ``package.module:function`` or ``path/to/file.py:function``."""

import importlib
import inspect
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import nn

from featvis_func.models.base import Model, seeded_init
from featvis_func.models.checks import describe_object
from featvis_func.validation import first_line, suggest


class Factory(NamedTuple):
    """The name of a function that makes a model."""

    place: str
    """A module's dotted name, or the path of a ``.py`` file."""
    function: str

    @property
    def is_file(self) -> bool:
        """Whether the place is a file."""
        return self.place.endswith(".py")


class NoSuchModuleError(ValueError):
    """There is no module of that name."""


def parse_factory(name: str) -> Factory | None:
    """Parse the name of a function that makes a model. Nothing is imported.

    The names of other models may have the same form: ``"timm:resnet18"``.

    >>> parse_factory("nets.small:make"), parse_factory("../nets/small.py:make")
    (Factory(place='nets.small', function='make'), Factory(place='../nets/small.py', function='make'))
    >>> parse_factory("texturenet"), parse_factory("hf-hub:org/name")
    (None, None)
    """
    place, colon, function = name.rpartition(":")
    factory = Factory(place, function)
    dotted = all(part.isidentifier() for part in place.split("."))
    return factory if colon and function.isidentifier() and (dotted or factory.is_file) else None


def call_factory(factory: Factory) -> nn.Module | Model:
    """Import a function and call it, both with a CPU generator seeded with 0.

    Raises:
        NoSuchModuleError: If there is no module of that name.
        ValueError: If there is no such file or function, if importing or calling it raises an exception, or if it
            returns something else.

    >>> call_factory(Factory("torch.nn", "Identity"))
    Identity()
    >>> call_factory(Factory("torch.nn", "Indentity"))
    Traceback (most recent call last):
        ...
    ValueError: torch.nn has no 'Indentity'; did you mean 'Identity'...?
    """
    place, name = factory
    with seeded_init():  # For modules that are made while it is imported.
        module = _import_file(place) if factory.is_file else _import_module(place)
    if not hasattr(module, name):
        raise ValueError(f"{place} has no {name!r}{suggest(name, [n for n, v in vars(module).items() if callable(v)])}")
    function = getattr(module, name)
    if isinstance(function, nn.Module | Model) or not callable(function):
        raise ValueError(
            f"{name!r} of {place} is {describe_object(function)}; expected a function without arguments that returns an"
            f" nn.Module or a Model"
        )
    try:
        with seeded_init():  # Once more: the import may draw numbers, and happens only once.
            made = function()
    except Exception as error:  # The user's function may raise any.
        needed = _needed_arguments(function)
        reason = f"needs {needed}, and is called without arguments" if needed else f"raises {_describe(error)}"
        raise ValueError(f"{name} of {place} {reason}") from error
    if not isinstance(made, nn.Module | Model):
        raise ValueError(
            f"{name} of {place} returns {describe_object(made)}; expected an nn.Module or a Model (of load_model)"
        )
    return made


def _import_module(name: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise NoSuchModuleError(f"there is no module {error.name!r} on Python's import path") from error
        raise ValueError(f"importing {name} raises {_describe(error)}") from error
    except (Exception, SystemExit) as error:  # The user's code may raise any; a script may end the process.
        raise ValueError(f"importing {name} raises {_describe(error)}") from error


def _import_file(place: str) -> ModuleType:
    """Import a file as Python does when it runs it: its folder comes first on the import path."""
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"no file {place!r}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    # Also where the name has a dot, which would name a module in a package.
    present = sys.modules.get(path.stem)
    if "." in path.stem or (present is not None and _file_of(present) != path):
        raise ValueError(
            f"the file {place!r} cannot be imported as {path.stem!r}, which is the name of another module; rename it"
        )
    module = _import_module(path.stem)
    if _file_of(module) != path:
        del sys.modules[path.stem]
        raise ValueError(
            f"the file {place!r} cannot be imported as {path.stem!r}, which is the name of another module"
            f" ({_file_of(module)}); rename it"
        )
    return module


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


def _needed_arguments(function: object) -> str:
    """Return the names of the arguments without which a function cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return ""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(p.name for p in parameters if p.default is p.empty and p.kind not in several)


def _describe(error: BaseException) -> str:
    message = first_line(error)
    return message if message == type(error).__name__ else f"{type(error).__name__}: {message}"
