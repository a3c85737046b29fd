"""The command line, as calls of the library. torch is imported late, so that ``--help`` is instant."""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from featvis_func.cli.arguments import (
    DEFAULT_MODEL,
    add_model,
    add_objective,
    add_options,
    given_objectives,
    given_options,
    join_negative_numbers,
    load,
    working_device,
)
from featvis_func.cli.commands import add_gallery, add_sweep
from featvis_func.io.display import describe_bands, display_of
from featvis_func.io.filter_spec import filter_numbers
from featvis_func.validation import first_line, table

_DEFAULT_LAYER = "block6.conv"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``featvis``.

    Args:
        argv: the arguments. Default: those of the process.

    Returns:
        The exit code: 0 for success, 1 for an error of torch or an incomplete sweep, 2 for bad input, 130 or 143 after
        a signal.
    """
    arguments = _parser().parse_args(join_negative_numbers(sys.argv[1:] if argv is None else argv))
    try:
        return arguments.run(arguments)
    except (ValueError, OverflowError, OSError) as error:
        print(f"featvis: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # Of torch: out of memory, the compiler, an operation that is not deterministic.
        print(f"featvis: error: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("featvis: interrupted; nothing unfinished was written", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="featvis", description="Feature visualisation: images that show what each filter of a layer responds to."
    )
    parser.add_argument("--version", action="version", version=f"featvis_func {metadata.version('featvis-func')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    render = commands.add_parser(
        "render",
        help="render the filters of a layer",
        description="Render one image per filter. Writes grid.png, a PNG per filter (for videos, and with --snapshots,"
        " also an animated WebP), result.safetensors, run.json and a static site, gallery/index.html.",
    )
    add_model(render)
    render.add_argument(
        "--layer",
        help=f"name of the layer, or the unique end of one (default for texturenet: {_DEFAULT_LAYER})",
    )
    add_objective(render)
    render.add_argument("--filters", default="all", help="numbers and ranges such as 0-7,12, or all (default: all)")
    add_options(render)
    render.add_argument(
        "--out", type=Path, default=Path("featvis-out"), help="folder for the files (default: %(default)s)"
    )
    render.add_argument("--no-gallery", action="store_true", help="do not write the static site, OUT/gallery")
    render.set_defaults(run=_render)

    layers = commands.add_parser(
        "layers",
        help="list the layers of a model",
        description="List the layers of a model in order, with type, output shape for one image and number of filters.",
    )
    add_model(layers)
    layers.add_argument(
        "--all",
        action="store_true",
        help="also list each call of modules that are called more than once (relu#2), the inputs of modules (conv<),"
        " operations inside of modules (block/add) and the model's own output",
    )
    layers.set_defaults(run=_layers)
    add_sweep(commands)
    add_gallery(commands)
    return parser


def _render(arguments: argparse.Namespace) -> int:
    filters = filter_numbers(arguments.filters)
    if arguments.layer is not None and arguments.objective is not None:
        raise ValueError("give --layer or --objective, not both")
    if arguments.layer is None and arguments.objective is None and arguments.model != DEFAULT_MODEL:
        raise ValueError(
            f"--layer or --objective is needed for {arguments.model};"
            f" 'featvis layers {arguments.model}' lists its layers"
        )

    import torch

    from featvis_func.gallery import build_gallery, check_place
    from featvis_func.rendering.api import render
    from featvis_func.rendering.files import writable_folder

    device = working_device(arguments.device)
    model = load(arguments)
    objective: Any = _DEFAULT_LAYER if arguments.layer is None else arguments.layer
    for selection in given_objectives(arguments, model):
        if selection.filters is not None and filters is not None:
            raise ValueError(f"the filters are given twice: by --objective {arguments.objective} and by --filters")
        objective, filters = selection.objective, selection.filters if filters is None else filters
    site = arguments.out / "gallery"
    if not arguments.no_gallery:
        check_place(site)
    new_folders = [p for p in (arguments.out, *arguments.out.parents) if not p.exists()]
    writable_folder(arguments.out)  # An error here costs no work.
    try:
        result = render(
            model,
            objective,
            filters,
            device=device,
            **given_options(arguments),
        )
        files = result.save(arguments.out)
        if not arguments.no_gallery:
            build_gallery(result, site)
    except BaseException:
        for folder in new_folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    not_ok = [f"{f} ({s})" for f, s in zip(result.filters, result.status, strict=True) if s != "ok"]
    finite = result.scores[torch.isfinite(result.scores)]
    words = describe_bands(display_of(result.config), model.channels) if result.images.ndim > 3 else ""
    shown = f"; pictures show {words}" if words and arguments.bands is None else ""
    gallery = "" if arguments.no_gallery else f"; gallery: {site / 'index.html'}"
    print(
        f"{len(result.filters)} filters of {result.config['layer']}, mean score {finite.mean().item():.4g}"
        f"{', not ok: ' + ', '.join(not_ok) if not_ok else ''}; {len(files)} files in {arguments.out}{shown}{gallery}"
    )
    return 0


def _layers(arguments: argparse.Namespace) -> int:
    from featvis_func.backbone.listing import list_layers

    layers = list_layers(load(arguments), all=arguments.all)
    rows = [("layer", "type", "output", "filters")]
    for layer in layers:
        shape = "-" if layer.shape is None else " x ".join(map(str, layer.shape))
        rows.append((layer.name, layer.type, shape, "-" if layer.filters is None else str(layer.filters)))
    print(table(rows))
    return 0
