"""The commands of whole networks: ``sweep``, ``status``, ``validate`` and ``gallery``. torch is imported late."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featvis_func.cli.arguments import (
    add_model,
    add_model_options,
    add_objective,
    add_options,
    argument,
    given_model_options,
    given_objectives,
    given_options,
    load,
    working_device,
)
from featvis_func.io.filter_spec import filter_numbers
from featvis_func.rendering.options import OPTIONS, SWEEP_OPTIONS, parse_bands, parse_batch_size
from featvis_func.validation import table

if TYPE_CHECKING:
    from featvis_func.sweep import DryRun, Status

# From a signal to the end of the process; batch systems and torchrun kill it after 30 s.
_GRACE_SECONDS = 20.0
# Longest list of problems that is printed.
_MOST_LINES = 20


def add_sweep(commands: Any) -> None:
    """Add ``sweep``, ``status`` and ``validate`` to the subparsers of ``featvis``."""
    sweep = commands.add_parser(
        "sweep",
        help="render whole layers or a network into a folder",
        description="Render every filter of many layers into a folder. If started again, continue an unfinished sweep.",
    )
    add_model(sweep)
    sweep.add_argument(
        "--layers",
        help="all (every convolution and linear layer; the default), or names, patterns such as 'block[34].conv,head'",
    )
    sweep.add_argument(
        "--filters", default="all", help="filters of each layer: numbers and ranges such as 0-7,12, or all"
    )
    add_objective(sweep, several=True)
    sweep.add_argument("--out", type=Path, required=True, help="folder of the sweep, shared by all its processes")
    sweep.add_argument(
        "--engine", default="local", help="local, torchrun, srun, array (of SLURM) or ray (default: %(default)s)"
    )
    sweep.add_argument(
        "--batch-size",
        type=argument(parse_batch_size),
        default="auto",
        help="number of filters that are rendered at the same time (default: 8, or 64 on a GPU)",
    )
    sweep.add_argument("--unit-size", type=int, help="filters committed together (default: the batch size)")
    sweep.add_argument(
        "--image-dtype", default="uint8", help="dtype of the stored images: uint8 or float16 (default: uint8)"
    )
    sweep.add_argument(
        "--workers", type=int, help="for ray: largest number of actors (default: as many as the cluster has room for)"
    )
    sweep.add_argument("--threads", type=int, help="CPU threads of each process or actor (default: torch's; ray: 2)")
    sweep.add_argument("--resume", action="store_true", help="continue the sweep in the folder, as is also the default")
    sweep.add_argument(
        "--dry-run", action="store_true", help="print the plan and the estimated time and size; write nothing"
    )
    add_options(sweep, sweep=True)
    sweep.set_defaults(run=_sweep)
    for name, purpose, run in (
        ("status", "print how much of a sweep is done", _status),
        ("validate", "check a sweep's folder: checksums, completeness, files that belong to no unit", _validate),
    ):
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        command.add_argument("folder", type=Path, metavar="DIR", help="the folder of a sweep")
        command.set_defaults(run=run)


def add_gallery(commands: Any) -> None:
    """Add ``gallery`` to the subparsers of ``featvis``."""
    gallery = commands.add_parser(
        "gallery",
        help="build a static site from a sweep or a rendering",
        description="Build a static site that shows every filter. What is up to date is not built again.",
    )
    gallery.add_argument("folder", type=Path, metavar="DIR", help="the folder of a sweep, or of a rendering")
    gallery.add_argument("--out", type=Path, metavar="SITE", help="the site's folder (default: DIR/gallery)")
    gallery.add_argument(
        "--moving", default="webp", help="format of videos and animated snapshots: webp or gif (default: webp)"
    )
    gallery.add_argument(
        "--bands",
        type=argument(parse_bands),
        metavar="N[,N,N]",
        help=f"{OPTIONS['bands'].help} (default: as rendered)",
    )
    gallery.add_argument(
        "--columns",
        type=Path,
        metavar="FILE.csv",
        help="file with a header and a row for each filter, by whose columns pages can be sorted; the column filter,"
        " member, number or name, or else the first, says which filter, by number or name, and a column layer says"
        " which layer or family, if there are several",
    )
    gallery.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder of photographs: add the nine that excite each filter most"
    )
    gallery.add_argument("--model", help="for --images: name of the model (default: the one that was rendered)")
    add_model_options(gallery, prefix="for --images: ")
    gallery.add_argument(
        "--device", help="for --images: device to compute on (default: cuda if there is one, else cpu)"
    )
    gallery.set_defaults(run=_gallery)


def _gallery(arguments: argparse.Namespace) -> int:
    if arguments.images is None:
        names = ("model", "weights", "mean", "std", "value_range", "input_size", "device")
        given = [name.replace("_", "-") for name in names if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} goes with --images")

    from featvis_func.gallery import build_gallery, source_of
    from featvis_func.models.loading import without_code

    options: dict[str, Any] = {}
    if arguments.images is not None:
        options = {"images": arguments.images, "device": working_device(arguments.device)}
        if arguments.model is not None or given_model_options(arguments):
            name = arguments.model or without_code(source_of(arguments.folder).title)
            options["model"] = load(arguments, name)
    options |= {"moving": arguments.moving, "bands": arguments.bands, "columns": arguments.columns}
    site = build_gallery(arguments.folder, arguments.out, progress=None, **options)
    print("\n".join(_first([f"left out: {problem}" for problem in site.problems])), end="\n" if site.problems else "")
    count = site.layers - site.families
    layers = [f"{count} layer{'' if count == 1 else 's'}"] if count or not site.families else []
    layers += [f"{site.families} famil{'y' if site.families == 1 else 'ies'}"] if site.families else []
    noun = "images" if site.families else "filters"
    print(f"{site.filters} {noun} of {' and '.join(layers)}, {site.made} of them made now: {site.path}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    filters = filter_numbers(arguments.filters)
    if arguments.layers == "all" and arguments.objective:
        raise ValueError("--objective goes with names of layers, not with --layers all")

    from featvis_func.sweep import TooManyFailedError, dry_run, open_store, rank_of, sweep

    rank = rank_of(arguments.engine)
    # The nodes of a cluster may have devices that this machine lacks.
    unchecked = arguments.engine == "ray" and arguments.device is not None
    device = arguments.device if unchecked else working_device(arguments.device)
    model = load(arguments)
    layers: Any = given_objectives(arguments, model)
    if arguments.layers is not None or not layers:
        names = (arguments.layers or "all").split(",")
        layers = "all" if names == ["all"] else [*(name.strip() for name in names), *layers]
    options = {name: value for name, value in given_options(arguments).items() if name in SWEEP_OPTIONS}
    sizes = {name: getattr(arguments, name) for name in ("batch_size", "unit_size", "image_dtype")}
    if arguments.dry_run:
        return _print_dry_run(dry_run(model, layers, filters, device=device, **sizes, **options))
    with _signals_raise():
        try:
            status = sweep(
                model,
                layers,
                filters,
                out=arguments.out,
                engine=arguments.engine,
                device=device,
                workers=arguments.workers,
                threads=arguments.threads,
                **sizes,
                **options,
            )
        except TooManyFailedError as error:
            print(_lines(open_store(arguments.out).status()))
            print(f"featvis: error: {error}", file=sys.stderr)
            return 1
    print(_lines(status))
    if rank.of > 1:
        print(f"process {rank.number} of {rank.of} has finished its share")
    return 1 if status.failed or status.damaged or (rank.of == 1 and not status.complete) else 0


def _lines(status: "Status") -> str:
    """The status of a sweep for people: what is done, and which units are missing and why."""
    lines = [f"{status.done} of {status.units} units done, {status.filters_done} of {status.filters} {status.noun}"]
    lines += [f"{count} {status.noun} are {word}" for word, count in sorted(status.odd.items())]
    missing = [f"{name} failed: {why}" for name, why in status.failed.items()]
    missing += [f"{name} is not sound: {what}" for name, what in status.damaged.items()]
    return "\n".join(lines + _first(missing))


def _first(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"and {more} more"] if more > 0 else [])]


def _print_dry_run(plan: "DryRun") -> int:
    rows: list[tuple[str, ...]] = [("layer", "filters", "units", "batch")]
    rows += [(p.layer, str(len(p.filters)), str(len(p.units)), str(p.batch_size)) for p in plan.plans]
    rows.append(("total", *(str(sum(int(row[i]) for row in rows[1:])) for i in (1, 2)), ""))
    print(table(rows))
    seconds, size = plan.estimate
    print(f"about {_duration(seconds)} on one worker like this, without tracing and compiling, and {size / 1e6:.3g} MB")
    return 0


def _duration(seconds: float) -> str:
    """A duration in hours, minutes or seconds, to two digits.

    >>> _duration(5400), _duration(59)
    ('1.5 h', '59 s')
    """
    unit, length = next((u for u in (("h", 3600), ("min", 60)) if seconds >= u[1]), ("s", 1))
    return f"{seconds / length:.2g} {unit}" if seconds / length < 99.5 else f"{seconds / length:.0f} {unit}"


def _status(arguments: argparse.Namespace) -> int:
    from featvis_func.sweep import open_store

    status = open_store(arguments.folder).status()
    print(_lines(status))
    return 0 if status.complete and not status.damaged else 1


def _validate(arguments: argparse.Namespace) -> int:
    from featvis_func.sweep import validate

    report = validate(arguments.folder)
    extra = [f"{name} belongs to no unit" for name in report.orphans]
    extra += [f"{name} is a spare copy and may be deleted" for name in report.spares]
    print("\n".join([_lines(report.status), *_first(extra)]))
    print("sound" if report.sound else "NOT sound; starting the sweep again repairs units that are missing or damaged")
    return 0 if report.sound else 1


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGINT raise :class:`Interrupted` in the block, and end the process if it runs on for too long.

    Nothing is lost by that, because files are written completely or not at all.
    """
    timers: list[threading.Timer] = []

    def interrupt(number: int, frame: object) -> None:
        timers.append(threading.Timer(_GRACE_SECONDS, os._exit, [128 + number]))
        timers[-1].daemon = True
        timers[-1].start()
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
