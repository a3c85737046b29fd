"""The command line: thin calls of the library. torch is imported late, so that ``--help`` is instant."""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from featvis_func.messages import first_line

_DEFAULT_MODEL = "texturenet"
_DEFAULT_LAYER = "block6.conv"
_MOST_FILTERS = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``featvis``.

    Args:
        argv: the arguments; default: the process's.

    Returns:
        The exit code: 0 done, 2 bad input, 1 what torch could not do (one line on the standard error), 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OverflowError, OSError) as error:
        print(f"featvis: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # of torch: memory, a compiler, an operation that cannot be repeated
        print(f"featvis: error: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("featvis: interrupted; nothing unfinished was written", file=sys.stderr)
        return 130


def filter_numbers(text: str) -> list[int] | None:
    """Reads a list of filters.

    Args:
        text: numbers and ranges, both ends included, such as ``0-7,12``; or ``all``.

    Returns:
        The numbers in the order given, or ``None`` for all.

    Raises:
        ValueError: anything else.

    >>> filter_numbers("0-3,12")
    [0, 1, 2, 3, 12]
    """
    if text == "all":
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"filters {text!r} must be numbers and ranges such as '0-7,12', or 'all'")
        if int(last or first) - int(first) >= _MOST_FILTERS:
            raise ValueError(f"filters {part.strip()!r} are more than any layer has")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="featvis", description="Feature visualisation: what does each filter of a layer look for?"
    )
    parser.add_argument("--version", action="version", version=f"featvis_func {metadata.version('featvis-func')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    render = commands.add_parser(
        "render",
        help="render the filters of a layer",
        description="Renders one image per filter; writes grid.png, a PNG per filter, result.safetensors and run.json.",
    )
    _add_model(render)
    render.add_argument(
        "--layer",
        help=f"name of the layer, or the unique end of one (default for texturenet: {_DEFAULT_LAYER})",
    )
    render.add_argument("--filters", default="all", help="numbers and ranges such as 0-7,12, or all (default: all)")
    render.add_argument("--steps", type=int, default=32, help="steps of ascent (default: %(default)s)")
    render.add_argument("--size", type=_size, help="pixels of the images, N or HxW (default: the model's input)")
    render.add_argument("--seed", type=int, default=0, help="another seed gives other images (default: %(default)s)")
    render.add_argument(
        "--views", default="default", help="random views: default, published, lucid or none (default: default)"
    )
    render.add_argument("--optimizer", default="default", help="default or published (default: default)")
    render.add_argument("--lr", type=float, help="learning rate (default: the optimizer's)")
    render.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        help="filters rendered at once (default: what suits the device)",
    )
    render.add_argument(
        "--tolerance", type=float, metavar="SHARE", help="stop a filter that rises by less than this share in 8 steps"
    )
    render.add_argument(
        "--precision", default="auto", help="of the model: auto, float32 or bfloat16 (default: %(default)s)"
    )
    render.add_argument(
        "--compile", default="auto", help="auto (where it pays), yes, no or cudagraphs (default: %(default)s)"
    )
    render.add_argument("--deterministic", action="store_true", help="bit-equal reruns on CUDA, too; slower there")
    render.add_argument("--device", help="where to compute, such as cuda (default: cuda where there is one, else cpu)")
    render.add_argument(
        "--out", type=Path, default=Path("featvis-out"), help="folder for the files (default: %(default)s)"
    )
    render.set_defaults(run=_render)

    layers = commands.add_parser(
        "layers",
        help="list the layers of a model",
        description="Lists the layers of a model in order, with type, output shape for one image and filter count.",
    )
    _add_model(layers)
    layers.set_defaults(run=_layers)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=_DEFAULT_MODEL,
        help="texturenet, or torchvision:NAME[@WEIGHTS] (@none: random)",
    )
    parser.add_argument("--weights", metavar="FILE", help="a state dict for the model: .safetensors, .pth or .pt")


def _size(text: str) -> tuple[int, int]:
    h, cross, w = text.partition("x")
    if not h.isdecimal() or (cross and not w.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected N or HxW pixels")
    return int(h), int(w or h)


def _batch_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no batch size; expected a number, or auto")
    return text if text == "auto" else int(text)


def _render(arguments: argparse.Namespace) -> int:
    filters = filter_numbers(arguments.filters)
    if arguments.layer is None and arguments.model != _DEFAULT_MODEL:
        raise ValueError(f"--layer is needed for {arguments.model}; 'featvis layers {arguments.model}' lists them")

    import torch

    from featvis_func.models import load_model
    from featvis_func.rendering import render
    from featvis_func.result import writable_folder

    device = _device(arguments.device)
    model = load_model(arguments.model, weights=arguments.weights)
    made = [p for p in (arguments.out, *arguments.out.parents) if not p.exists()]
    writable_folder(arguments.out)  # before the work, not after it
    try:
        result = render(
            model,
            _DEFAULT_LAYER if arguments.layer is None else arguments.layer,
            filters,
            steps=arguments.steps,
            size=arguments.size,
            seed=arguments.seed,
            views=arguments.views,
            optimizer=arguments.optimizer,
            lr=arguments.lr,
            batch_size=arguments.batch_size,
            tolerance=arguments.tolerance,
            device=device,
            precision=arguments.precision,
            compile=arguments.compile,
            deterministic=arguments.deterministic,
        )
        files = result.save(arguments.out)
    except BaseException:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    odd = [f"{f} ({s})" for f, s in zip(result.filters, result.status, strict=True) if s != "ok"]
    finite = result.scores[torch.isfinite(result.scores)]
    print(
        f"{len(result.filters)} filters of {result.config['layer']}, mean score {finite.mean().item():.4g}"
        f"{', not ok: ' + ', '.join(odd) if odd else ''}; {len(files)} files in {arguments.out}"
    )
    return 0


def _layers(arguments: argparse.Namespace) -> int:
    from featvis_func.features import list_layers
    from featvis_func.models import load_model

    layers = list_layers(load_model(arguments.model, weights=arguments.weights))
    rows = [("layer", "type", "output", "filters")]
    for layer in layers:
        shape = "-" if layer.shape is None else " x ".join(map(str, layer.shape))
        rows.append((layer.name, layer.type, shape, "-" if layer.filters is None else str(layer.filters)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    return 0


def _device(name: str | None) -> str:
    """A device that works, by name; the default is CUDA where there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # no such device; not compiled in; a plugin is missing
        raise ValueError(f"no device {name!r} here: {first_line(error)}") from error
    return name
