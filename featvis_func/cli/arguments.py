"""What several commands of the command line share. torch is imported late, so that ``--help`` is instant."""

import argparse

DEFAULT_MODEL = "texturenet"
RENDER_OPTIONS = (
    "steps", "size", "seed", "views", "image", "optimizer", "lr", "tolerance", "redirect", "precision", "compile",
    "deterministic", "snapshots",
)  # fmt: skip
"""What :func:`add_options` adds, but for the device."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        help="texturenet, torchvision:NAME[@WEIGHTS] or timm:NAME (@none: random weights), hf-hub:ORG/NAME (of timm),"
        " or transformers:ORG/NAME; after timm: and transformers: also a ./folder",
    )
    parser.add_argument("--weights", metavar="FILE", help="a state dict for the model: .safetensors, .pth or .pt")


def add_options(command: argparse.ArgumentParser) -> None:
    """What a rendering takes, of one layer or of many."""
    command.add_argument("--steps", type=int, default=32, help="steps of ascent (default: %(default)s)")
    command.add_argument("--size", type=size, help="pixels of the images, N or HxW (default: the model's input)")
    command.add_argument("--seed", type=int, default=0, help="another seed gives other images (default: %(default)s)")
    command.add_argument(
        "--views", default="default", help="random views: default, published, lucid, maco or none (default: default)"
    )
    command.add_argument(
        "--optimizer", default="default", help="default, published, adam, adamw, nadam or sgd (default: default)"
    )
    command.add_argument(
        "--image",
        default="fourier",
        help="what stands for the image: fourier, pixel, phase, laplacian_pyramid, cppn or alpha (default: fourier)",
    )
    command.add_argument("--lr", type=float, help="learning rate (default: the optimizer's)")
    command.add_argument(
        "--tolerance", type=float, metavar="SHARE", help="stop a filter that rises by less than this share in 8 steps"
    )
    command.add_argument(
        "--redirect", type=int, metavar="STEPS", help="first steps that redirect dead gradients (default: optimizer's)"
    )
    command.add_argument(
        "--precision", default="auto", help="of the model: auto, float32 or bfloat16 (default: %(default)s)"
    )
    command.add_argument(
        "--compile", default="auto", help="auto (where it pays), yes, no or cudagraphs (default: %(default)s)"
    )
    command.add_argument("--deterministic", action="store_true", help="bit-equal reruns on CUDA, too; slower there")
    command.add_argument(
        "--snapshots", type=int, default=0, metavar="K", help="keep K images of each filter over its run (default: 0)"
    )
    command.add_argument("--device", help="where to compute, such as cuda (default: cuda where there is one, else cpu)")


def size(text: str) -> tuple[int, int]:
    """Reads ``N`` or ``HxW`` pixels."""
    h, cross, w = text.partition("x")
    if not h.isdecimal() or (cross and not w.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected N or HxW pixels")
    return int(h), int(w or h)


def batch_size(text: str) -> int | str:
    """Reads a number, or ``auto``."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no batch size; expected a number, or auto")
    return text if text == "auto" else int(text)


def working_device(name: str | None) -> str:
    """A device that works, by name; the default is CUDA where there is one."""
    import torch

    from featvis_func.engine.device import check_device

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name
