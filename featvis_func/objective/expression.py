"""How an objective is written as a Python expression: for people, and to make it again.

An :class:`~featvis_func.objective.Objective` that a function of this room returns knows the call that made it; sums and
multiples know theirs. Tensors do not fit into an expression: :func:`to_code` puts names in their place and says what
these stand for.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor


class Call(NamedTuple):
    """A call of one of the functions of :mod:`featvis_func.objective`."""

    function: str
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()
    """Names and values; those that have their default are left out."""

    def __str__(self) -> str:
        """As it is shown to people, with tensors as ``<4 numbers>``."""
        return _written(self, _shown)


class Scaled(NamedTuple):
    """An objective times a number."""

    factor: float
    inner: "Expression"

    def __str__(self) -> str:
        return _written(self, _shown)


class Combined(NamedTuple):
    """The sum or the difference of two objectives."""

    left: "Expression"
    sign: str
    """``"+"`` or ``"-"``."""
    right: "Expression"

    def __str__(self) -> str:
        return _written(self, _shown)


Expression: TypeAlias = Call | Scaled | Combined | str
"""``str``: the name of an objective of the user's own, which no expression makes."""


class Code(NamedTuple):
    """Python code that makes an objective."""

    expression: str
    functions: tuple[str, ...]
    """What it needs from :mod:`featvis_func.objective`."""
    values: dict[str, str]
    """Variables that the expression uses and that its reader has to supply -> what each stands for."""


def call(function: str, *arguments: Any, **keywords: Any) -> Call:
    """A call without the arguments that are ``None``.

    >>> print(call("neuron", "conv", None, position=(1, 2)))
    neuron('conv', position=(1, 2))
    """
    given = tuple((name, value) for name, value in keywords.items() if value is not None)
    return Call(function, tuple(value for value in arguments if value is not None), given)


def to_code(expression: Expression) -> Code:
    """Write an expression as Python code, with a variable for each value that cannot be written.

    >>> import torch
    >>> code = to_code(call("direction", "conv", torch.ones(96)))
    >>> code.expression, code.values
    ("direction('conv', vector)", {'vector': 'a tensor (96,) of torch.float32'})
    """
    functions: dict[str, None] = {}
    values: dict[str, str] = {}

    def variable(name: str, meaning: str) -> str:
        free = name
        while free in values:
            number = int(free.rpartition("_")[2]) + 1 if free != name else 2
            free = f"{name}_{number}"
        values[free] = meaning
        return free

    def value(given: Any, parameter: str) -> str:
        if isinstance(given, Tensor):
            return variable(parameter, f"a tensor {tuple(given.shape)} of {given.dtype}")
        if isinstance(given, Mapping):
            layers = ", ".join(repr(layer) for layer in given)
            return variable(parameter, f"the activations of {layers} for an image, by fv.activations_of")
        return repr(given)

    def own(name: str) -> str:
        return variable("own_objective", f"your own objective {name!r}")

    def seen(name: str) -> None:
        functions[name] = None

    return Code(_written(expression, value, own, seen), tuple(functions), values)


def _shown(given: Any, parameter: str) -> str:
    if isinstance(given, Tensor):
        return f"<{given.numel()} numbers>" if given.ndim == 1 else f"<{parameter}>"
    if isinstance(given, Mapping):
        return ", ".join(repr(layer) for layer in given)
    return repr(given)


def _written(expression: Expression, value: Any, own: Any = str, seen: Any = lambda name: None) -> str:
    """An expression as text; ``value`` writes an argument, ``own`` a user's own objective, ``seen`` is told of functions."""
    if isinstance(expression, str):
        return own(expression)
    if isinstance(expression, Scaled):
        inner = _written(expression.inner, value, own, seen)
        return f"{number(expression.factor)} * " + (f"({inner})" if isinstance(expression.inner, Combined) else inner)
    if isinstance(expression, Combined):
        left, right = (_written(part, value, own, seen) for part in (expression.left, expression.right))
        grouped = expression.sign == "-" and isinstance(expression.right, Combined)
        return f"{left} {expression.sign} {f'({right})' if grouped else right}"
    seen(expression.function)
    names = _parameters(expression.function)

    def argument(given: Any, parameter: str) -> str:
        if isinstance(given, Call | Scaled | Combined):
            return _written(given, value, own, seen)
        return value(given, parameter)

    parts = [argument(given, names[i] if i < len(names) else "value") for i, given in enumerate(expression.arguments)]
    parts += [f"{name}={argument(given, name)}" for name, given in expression.keywords]
    return f"{expression.function}({', '.join(parts)})"


def _parameters(function: str) -> list[str]:
    from featvis_func import objective

    return list(inspect.signature(getattr(objective, function)).parameters)


def number(value: float) -> str:
    """A number with the fewest digits that identify it."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
