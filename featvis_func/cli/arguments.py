"""Arguments that several commands share. torch is imported late, so that ``--help`` is instant."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from featvis_func.rendering.options import DEFAULTS, OPTIONS, default_of, flag_of

if TYPE_CHECKING:
    from featvis_func.models import Model
    from featvis_func.rendering.spec import Selection

DEFAULT_MODEL = "texturenet"
# Options whose default differs from that in Python, where settings of the whole process are the caller's.
_DEFAULTS = {"retain_memory": True}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and its weights to a command."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        help="texturenet, torchvision:NAME[@WEIGHTS] or timm:NAME (@none: random weights), hf-hub:ORG/NAME (of timm),"
        " or transformers:ORG/NAME; after timm: and transformers: also a ./folder; package.module:function or"
        " path/to/file.py:function imports code of yours, and calls a function that returns the model",
    )
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser, *, prefix: str = "") -> None:
    """Add how a model is loaded to a command; ``prefix`` begins each help text."""
    parser.add_argument("--weights", metavar="FILE", help=f"{prefix}a state dict: .safetensors, .pth or .pt")
    for name, metavar, text in (
        ("mean", "M,M,M", "mean per channel that is subtracted from the model's input (default: of its preset)"),
        ("std", "S,S,S", "standard deviation per channel that it is divided by (default: of its preset)"),
        ("value-range", "LO,HI", "values that the model takes for black and white, such as 0,255 or -1,1; mean and std"
         " are in the same units, and 0 and 1 by default"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=argument(parse_numbers), metavar=metavar, help=prefix + text)
    parser.add_argument(
        "--input-size",
        type=argument(parse_input_size),
        metavar="HxW",
        help=f"{prefix}input size: a side in pixels, HxW, or TxHxW for videos (default: of its preset)",
    )


def add_objective(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the objective in one line, and what is made of it, to a command.

    Args:
        parser: of the command.
        several: whether the command takes more than one.
    """
    parser.add_argument(
        "--objective",
        action="append" if several else "store",
        metavar="SPEC",
        help="instead of a layer: channel:LAYER[:NUMBERS], neuron:LAYER:CHANNELS@POSITION[;POSITION...],"
        " logit:[LAYER:]CLASSES, directions:LAYER:FILE[TENSOR][@POSITION][:NUMBERS] for the rows of a matrix, or"
        " sae:LAYER:FILE[@POSITION][:NUMBERS] for the features of a sparse autoencoder"
        + ("; may be given several times" if several else ""),
    )
    parser.add_argument(
        "--minus",
        metavar="[FACTOR*]SPEC",
        help="objective that is subtracted: with a number the same for all, without one for each member",
    )
    parser.add_argument("--facets", type=int, metavar="N", help="show each member in N images that differ in style")
    parser.add_argument("--similarity", help="for directions: dot, cosine or dot_cosine (default: dot)")


def given_objectives(arguments: argparse.Namespace, model: "Model") -> "list[Selection]":
    """The objectives that a command's arguments ask for.

    Raises:
        ValueError: one that cannot be read, or options of an objective without one.
    """
    from featvis_func.rendering.spec import parse_spec

    given = arguments.objective
    texts: list[str] = [] if given is None else given if isinstance(given, list) else [given]
    stray = [name for name in ("minus", "facets", "similarity") if getattr(arguments, name) is not None]
    if not texts and stray:
        raise ValueError(f"--{stray[0]} goes with --objective")
    options = {"minus": arguments.minus, "copies": arguments.facets, "similarity": arguments.similarity}
    return [parse_spec(text, model, **options) for text in texts]


def given_model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a command's arguments say about how the model is loaded, as arguments of ``load_model``."""
    names = {"weights": "weights", "mean": "mean", "std": "std", "value_range": "value_range", "input_size": "size"}
    values = {argument: getattr(arguments, name) for name, argument in names.items()}
    return {argument: value for argument, value in values.items() if value is not None}


def load(arguments: argparse.Namespace, name: str | None = None) -> "Model":
    """Load the model that a command's arguments name, or the one of another name, with the options they give.

    As with ``python -m``, the current folder comes first on the import path, for models made by a function of the
    user's.
    """
    from featvis_func.models import load_model
    from featvis_func.models.loading import names_code

    name = str(name or arguments.model)
    if names_code(name) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return load_model(name, **given_model_options(arguments))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Parse numbers with commas between them.

    >>> parse_numbers("0.5, 1e-2")
    (0.5, 0.01)
    """
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"must be numbers such as '0.485,0.456,0.406', got {text!r}") from error


def parse_input_size(text: str) -> int | tuple[int, ...]:
    """Parse a side, or sides with an x between them.

    >>> parse_input_size("224"), parse_input_size("16x112x112")
    (224, (16, 112, 112))
    """
    try:
        numbers = [int(number) for number in text.split("x")]
    except ValueError as error:
        raise ValueError(f"must be whole numbers such as '224', '48x64' or '16x112x112', got {text!r}") from error
    return tuple(numbers) if len(numbers) > 1 else numbers[0]


def join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """Join a flag and a value such as ``-1,1``, which argparse would take for a flag.

    >>> join_negative_numbers(["--value-range", "-1,1", "--seed", "-1"])
    ['--value-range=-1,1', '--seed', '-1']
    """
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] in ("--mean", "--std", "--value-range", "--minus") and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def add_options(parser: argparse.ArgumentParser, *, sweep: bool = False) -> None:
    """Add a flag for each option of a rendering, and the device, to a command.

    Args:
        parser: of the command.
        sweep: whether to add only the options that a sweep takes.
    """
    for name, option in OPTIONS.items():
        if (sweep and not option.in_sweep) or name == "device":
            continue
        flags = [flag_of(name), *map(flag_of, option.aliases)]
        default = _DEFAULTS.get(name, DEFAULTS[name])
        if option.parse is None:
            action = argparse.BooleanOptionalAction if default else "store_true"
            parser.add_argument(*flags, dest=name, action=action, default=default, help=option.help)
        else:
            parser.add_argument(
                *flags,
                dest=name,
                type=argument(option.parse),
                default=default,
                metavar=option.metavar or name.upper(),
                help=f"{option.help} (default: {default_of(name)})",
            )
    parser.add_argument("--device", help="device to compute on, such as cuda (default: cuda if there is one, else cpu)")


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a rendering among a command's arguments, without the device."""
    return {name: getattr(arguments, name) for name in OPTIONS if name != "device" and hasattr(arguments, name)}


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap a parser for argparse, which shows the message of its own type of error only, not that of a ValueError."""

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    # For these, argparse has a message of its own, such as "invalid int value: 'many'".
    return parse if parse in (int, float, str) else checked


def working_device(name: str | None) -> str:
    """Check a device's name. Default: CUDA if there is a device, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch

    from featvis_func.engine.device import check_device

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name
