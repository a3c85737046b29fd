"""Objectives made again from their recorded code."""

import ast
import inspect
import operator
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from featvis_func.objective.base import Objective

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def from_code(code: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Objective:
    """Make an objective from its code, without running anything but the functions of this package.

    Args:
        code: a :class:`~featvis_func.objective.expression.Code` as JSON holds it.
        tensors: what its variables stand for.

    Raises:
        ValueError: code that is no objective of this package, or a variable that is not among ``tensors``.

    >>> from_code({"expression": "channel('conv') - 0.5 * channel('conv', 3)"}, {})
    channel('conv') - 0.5 * channel('conv', 3)
    """
    functions = vars(import_module("featvis_func.objective"))
    text = str(code.get("expression"))

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(value(entry) for entry in node.elts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name) and node.id in tensors:
            return tensors[node.id]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            function = functions[node.func.id]
            if inspect.isfunction(function) and all(keyword.arg for keyword in node.keywords):
                return function(*map(value, node.args), **{str(k.arg): value(k.value) for k in node.keywords})
        raise ValueError(f"{text!r} cannot be made again: {ast.unparse(node)} is not known")

    try:
        made = value(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"{text!r} is not the code of an objective") from error
    if not isinstance(made, Objective):
        raise ValueError(f"{text!r} is not the code of an objective")
    return made
