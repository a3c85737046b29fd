"""Objectives as Python expressions, which name them and from which they can be made again.

Every :class:`~featvis_func.objective.Objective` that a function of this package returns records the call that made it;
sums and multiples record their operands. A tensor cannot be written in an expression: :func:`to_code` writes a variable
in its place, and lists what each variable stands for.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

_MOST_VALUES = 8  # of a tuple, for display


class Call(NamedTuple):
    """A call of one of the functions of :mod:`featvis_func.objective`."""

    function: str
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()
    """Names and values; arguments that have their default value are left out."""

    def __str__(self) -> str:
        """The call for display, with tensors abbreviated as ``<4 numbers>``."""
        return _write(self, _abbreviate)


class Scaled(NamedTuple):
    """An objective times a number."""

    factor: float
    inner: "Expression"

    def __str__(self) -> str:
        return _write(self, _abbreviate)


class Combined(NamedTuple):
    """The sum or the difference of two objectives."""

    left: "Expression"
    sign: str
    """``"+"`` or ``"-"``."""
    right: "Expression"

    def __str__(self) -> str:
        return _write(self, _abbreviate)


class UserObjective(NamedTuple):
    """A user-defined objective, of which only the name is known."""

    name: str

    def __str__(self) -> str:
        return self.name


Expression: TypeAlias = Call | Scaled | Combined | UserObjective


class Code(NamedTuple):
    """Python code that makes an objective."""

    expression: str
    functions: tuple[str, ...]
    """The functions of :mod:`featvis_func.objective` that the expression calls."""
    values: dict[str, str]
    """Variables that have to be defined before the expression is evaluated -> what each stands for."""


def call(function: str, *arguments: Any, **keywords: Any) -> Call:
    """Record a call, without the arguments that are ``None``.

    >>> print(call("neuron", "conv", None, position=(1, 2)))
    neuron('conv', position=(1, 2))
    """
    given = tuple((name, value) for name, value in keywords.items() if value is not None)
    return Call(function, tuple(value for value in arguments if value is not None), given)


def to_code(expression: Expression) -> Code:
    """Write an expression as Python code, with a variable for each value that cannot be written as a literal.

    >>> import torch
    >>> code = to_code(call("direction", "conv", torch.ones(96)))
    >>> code.expression, code.values
    ("direction('conv', vector)", {'vector': 'a tensor (96,) of torch.float32'})
    """
    return _collect(expression)[0]


def tensors_of(expression: Expression) -> dict[str, Tensor]:
    """The tensors that an expression refers to, by the variables that :func:`to_code` writes for them; those of a
    mapping by variable and key.

    >>> import torch
    >>> tensors_of(call("direction", "conv", torch.ones(2)))
    {'vector': tensor([1., 1.])}
    """
    return _collect(expression)[1]


def has_user_objective(expression: Expression) -> bool:
    """Whether an expression refers to an objective of the user's own, of which only the name is known.

    >>> has_user_objective(Scaled(2.0, UserObjective("mine")))
    True
    """
    return any(meaning.startswith("your own objective") for meaning in _collect(expression)[0].values.values())


def _collect(expression: Expression) -> tuple[Code, dict[str, Tensor]]:
    """The code of an expression, and the tensors behind its variables."""
    functions: dict[str, None] = {}
    values: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}

    def new_variable(name: str, meaning: str) -> str:
        unused = name
        number = 2
        while unused in values:
            unused = f"{name}_{number}"
            number += 1
        values[unused] = meaning
        return unused

    def write_value(value: Any, parameter: str) -> str:
        if isinstance(value, Tensor):
            variable = new_variable(parameter, f"a tensor {tuple(value.shape)} of {value.dtype}")
            tensors[variable] = value
            return variable
        if isinstance(value, Mapping):
            layers = ", ".join(repr(layer) for layer in value)
            variable = new_variable(parameter, f"the activations of {layers} for an image, by fv.activations_of")
            tensors.update({f"{variable}[{layer!r}]": values for layer, values in value.items()})
            return variable
        return repr(_builtin(value))

    def write_user_objective(name: str) -> str:
        return new_variable("own_objective", f"your own objective {name!r}")

    def record_function(name: str) -> None:
        functions[name] = None

    text = _write(expression, write_value, write_user_objective, record_function)
    return Code(text, tuple(functions), values), tensors


def _abbreviate(value: Any, parameter: str) -> str:
    if isinstance(value, tuple) and len(value) > _MOST_VALUES:
        return f"<{len(value)} {parameter}>"
    if isinstance(value, Tensor):
        return f"<{value.numel()} numbers>" if value.ndim == 1 else f"<{parameter}>"
    if isinstance(value, Mapping):
        return ", ".join(repr(layer) for layer in value)
    return repr(_builtin(value))


def _builtin(value: Any) -> Any:
    """A numpy number, or a tuple of them, as Python's own, which an expression can hold."""
    if isinstance(value, tuple):
        return tuple(_builtin(entry) for entry in value)
    return value.item() if hasattr(value, "item") else value


def _write(
    expression: Expression,
    write_value: Callable[[Any, str], str],
    write_user_objective: Callable[[str], str] = str,
    record_function: Callable[[str], None] = lambda name: None,
) -> str:
    """Write an expression as text.

    Args:
        expression: the expression.
        write_value: (argument of a call, name of its parameter) -> text.
        write_user_objective: name of a user-defined objective -> text.
        record_function: called with the name of each function that the expression calls.
    """

    def write(inner: Expression) -> str:
        return _write(inner, write_value, write_user_objective, record_function)

    if isinstance(expression, UserObjective):
        return write_user_objective(expression.name)
    if isinstance(expression, Scaled):
        inner = write(expression.inner)
        return f"{number(expression.factor)} * " + (f"({inner})" if isinstance(expression.inner, Combined) else inner)
    if isinstance(expression, Combined):
        left, right = write(expression.left), write(expression.right)
        grouped = expression.sign == "-" and isinstance(expression.right, Combined)
        return f"{left} {expression.sign} {f'({right})' if grouped else right}"
    record_function(expression.function)
    parameters = _parameters(expression.function)

    def write_argument(value: Any, parameter: str) -> str:
        return write(value) if isinstance(value, Expression) else write_value(value, parameter)

    parts = [
        write_argument(value, parameters[i] if i < len(parameters) else "value")
        for i, value in enumerate(expression.arguments)
    ]
    parts += [f"{name}={write_argument(value, name)}" for name, value in expression.keywords]
    return f"{expression.function}({', '.join(parts)})"


def _parameters(function: str) -> list[str]:
    from featvis_func import objective

    return list(inspect.signature(getattr(objective, function)).parameters)


def number(value: float) -> str:
    """Write a number with as few digits as identify it.

    >>> number(0.5), number(2.0), number(0.1234567)
    ('0.5', '2', '0.1234567')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
