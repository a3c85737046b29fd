"""Arguments that several commands share. torch is imported late, so that ``--help`` is instant."""

import argparse
from collections.abc import Callable
from typing import Any

from featvis_func.rendering.options import DEFAULTS, OPTIONS, default_of, flag_of

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
        " or transformers:ORG/NAME; after timm: and transformers: also a ./folder",
    )
    parser.add_argument("--weights", metavar="FILE", help="a state dict for the model: .safetensors, .pth or .pt")


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
