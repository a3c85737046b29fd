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

from featvis_func.cli.arguments import add_model, add_options, argument, given_options, working_device
from featvis_func.io.filter_spec import filter_numbers
from featvis_func.rendering.options import SWEEP_OPTIONS, parse_batch_size
from featvis_func.validation import table

if TYPE_CHECKING:
    from featvis_func.sweep import DryRun, Status

# After a signal; batch systems and torchrun kill after 30.
_GRACE_SECONDS = 20.0
# Of what is wrong or missing, at most so many lines.
_MOST_LINES = 20


def add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="render whole layers or a network into a folder",
        description="Renders every filter of many layers into a folder. Started again, it goes on where it was.",
    )
    add_model(sweep)
    sweep.add_argument(
        "--layers",
        default="all",
        help="all (every convolution and linear layer), or names and patterns such as 'block[34].conv,head'",
    )
    sweep.add_argument("--filters", default="all", help="of each layer: numbers and ranges such as 0-7,12, or all")
    sweep.add_argument("--out", type=Path, required=True, help="folder of the sweep, shared by all its processes")
    sweep.add_argument(
        "--engine", default="local", help="local, torchrun, srun, array (of SLURM) or ray (default: %(default)s)"
    )
    sweep.add_argument(
        "--batch-size",
        type=argument(parse_batch_size),
        default="auto",
        help="filters rendered at once (default: 8, or 64 on a GPU)",
    )
    sweep.add_argument("--unit-size", type=int, help="filters committed together (default: the batch size)")
    sweep.add_argument("--image-dtype", default="uint8", help="of stored images: uint8 or float16 (default: uint8)")
    sweep.add_argument("--workers", type=int, help="the most actors, for ray (default: what the cluster has room for)")
    sweep.add_argument("--threads", type=int, help="processors of each process or actor (default: torch's; ray: 2)")
    sweep.add_argument("--resume", action="store_true", help="go on where the folder is; so it does without, too")
    sweep.add_argument("--dry-run", action="store_true", help="print units, time and bytes; write nothing")
    add_options(sweep, sweep=True)
    sweep.set_defaults(run=_sweep)
    for name, does, run in (
        ("status", "how far a sweep is", _status),
        ("validate", "check a sweep's folder: checksums, completeness, orphans", _validate),
    ):
        command = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        command.add_argument("folder", type=Path, metavar="DIR", help="the folder of a sweep")
        command.set_defaults(run=run)


def add_gallery(commands: Any) -> None:
    gallery = commands.add_parser(
        "gallery",
        help="build a static site to look through a sweep or a rendering",
        description="Builds a static site that shows every filter; what is there and still holds is not built again.",
    )
    gallery.add_argument("folder", type=Path, metavar="DIR", help="the folder of a sweep, or of a rendering")
    gallery.add_argument("--out", type=Path, metavar="SITE", help="the site's folder (default: DIR/gallery)")
    gallery.add_argument(
        "--moving", default="webp", help="format of snapshots to download: webp or gif (default: webp)"
    )
    gallery.add_argument(
        "--images", type=Path, metavar="FOLDER", help="photographs: adds the nine that excite each filter most"
    )
    gallery.add_argument("--model", help="for --images: the model (default: the one that was rendered)")
    gallery.add_argument("--weights", metavar="FILE", help="for --images: its state dict, where it was given one")
    gallery.add_argument("--device", help="for --images: where to compute (default: cuda where there is one, else cpu)")
    gallery.set_defaults(run=_gallery)


def _gallery(arguments: argparse.Namespace) -> int:
    if arguments.images is None:
        given = [name for name in ("model", "weights", "device") if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} goes with --images")

    from featvis_func.gallery import build_gallery, source_of
    from featvis_func.models import load_model

    options = {}
    if arguments.images is not None:
        options = {"images": arguments.images, "device": working_device(arguments.device)}
        if arguments.model is not None or arguments.weights is not None:
            name = arguments.model or source_of(arguments.folder).title
            options["model"] = load_model(name, weights=arguments.weights)
    made = build_gallery(arguments.folder, arguments.out, moving=arguments.moving, progress=None, **options)
    print("\n".join(_first([f"left out: {problem}" for problem in made.problems])), end="\n" if made.problems else "")
    layers = f"{made.layers} layer{'' if made.layers == 1 else 's'}"
    print(f"{made.filters} filters of {layers}, {made.made} of them made now: {made.path}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    filters = filter_numbers(arguments.filters)
    layers: str | list[str] = "all" if arguments.layers == "all" else [n.strip() for n in arguments.layers.split(",")]

    from featvis_func.models import load_model
    from featvis_func.sweep import TooManyFailedError, dry_run, open_store, rank_of, sweep

    rank = rank_of(arguments.engine)
    # The nodes of a cluster may have what this one has not.
    there = arguments.engine == "ray" and arguments.device is not None
    device = arguments.device if there else working_device(arguments.device)
    model = load_model(arguments.model, weights=arguments.weights)
    options = {name: value for name, value in given_options(arguments).items() if name in SWEEP_OPTIONS}
    sizes = {name: getattr(arguments, name) for name in ("batch_size", "unit_size", "image_dtype")}
    if arguments.dry_run:
        found = dry_run(model, layers, filters, device=device, **sizes, **options)
        return _print_dry_run(found)
    with _stopping_soon():
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
        print(f"the share of process {rank.number} of {rank.of} is through")
    return 1 if status.failed or status.damaged or (rank.of == 1 and not status.complete) else 0


def _lines(status: "Status") -> str:
    """How far a sweep is, and what is missing and why."""
    lines = [f"{status.done} of {status.units} units done, {status.filters_done} of {status.filters} filters"]
    lines += [f"{count} filters are {word}" for word, count in sorted(status.odd.items())]
    missing = [f"{name} failed: {why}" for name, why in status.failed.items()]
    missing += [f"{name} is not sound: {what}" for name, what in status.damaged.items()]
    return "\n".join(lines + _first(missing))


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"and {more} more"] if more > 0 else [])]


def _print_dry_run(found: "DryRun") -> int:
    rows: list[tuple[str, ...]] = [("layer", "filters", "units", "batch")]
    rows += [(p.layer, str(len(p.filters)), str(len(p.units)), str(p.batch_size)) for p in found.plans]
    rows.append(("total", *(str(sum(int(row[i]) for row in rows[1:])) for i in (1, 2)), ""))
    print(table(rows))
    seconds, size = found.estimate
    print(f"about {_duration(seconds)} on one worker like this, without tracing and compiling, and {size / 1e6:.3g} MB")
    return 0


def _duration(seconds: float) -> str:
    """Hours, minutes or seconds, to two digits.

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
    orphans = [f"{name} belongs to no unit" for name in report.orphans]
    orphans += [f"{name} is a spare copy, and may go" for name in report.spares]
    print("\n".join([_lines(report.status), *_first(orphans)]))
    print("sound" if report.sound else "NOT sound; starting the sweep again mends units that are missing or damaged")
    return 0 if report.sound else 1


@contextmanager
def _stopping_soon() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does; what has not ended a while after either is ended from outside.

    Nothing is lost: what is written is written whole, or not at all.
    """

    watches: list[threading.Timer] = []

    def stop(number: int, frame: object) -> None:
        watches.append(threading.Timer(_GRACE_SECONDS, os._exit, [128 + number]))
        watches[-1].daemon = True
        watches[-1].start()
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for watch in watches:
            watch.cancel()


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
