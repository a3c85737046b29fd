"""The one-call door to whole layers and networks."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import nn

from featvis_func.backbone.verify import PRECISIONS
from featvis_func.engine.batching import check_tolerance
from featvis_func.engine.device import check_compile, check_device
from featvis_func.engine.snapshots import snapshot_steps
from featvis_func.io.atomic import remove_abandoned, whole_path
from featvis_func.io.filter_spec import ranges
from featvis_func.models import Model, fingerprint, load_model
from featvis_func.rendering.api import render
from featvis_func.rendering.options import IMAGES, optimizer_for
from featvis_func.rendering.presets import OPTIMIZERS, VIEWS
from featvis_func.sweep import launchers as engines
from featvis_func.sweep import ray_engine as cluster
from featvis_func.sweep.layout import Run, start_folder
from featvis_func.sweep.plan import Estimate, LayerPlan, RenderOptions, estimate, plan_layers
from featvis_func.sweep.shard import DTYPES
from featvis_func.sweep.validate import Status, read_status
from featvis_func.sweep.worker import Worker, renderers
from featvis_func.validation import check_int, check_name, check_seed, check_size

_DEFAULTS: dict[str, Any] = {
    name: inspect.signature(render).parameters[name].default for name in RenderOptions.__annotations__
}


class DryRun(NamedTuple):
    """What a sweep would do."""

    plans: tuple[LayerPlan, ...]
    estimate: Estimate


def sweep(
    model: str | nn.Module | Model,
    layers: str | Iterable[str] = "all",
    filters: Iterable[int] | int | None = None,
    *,
    out: str | Path,
    engine: str = "local",
    batch_size: int | str = "auto",
    unit_size: int | None = None,
    image_dtype: str = "uint8",
    device: str | torch.device | None = None,
    workers: int | None = None,
    threads: int | None = None,
    progress: bool | None = None,
    **options: Unpack[RenderOptions],
) -> Status:
    """Renders whole layers or networks into a folder; started again, it goes on where it was.

    The folder is for one configuration, which never changes; what is done is not done again. A filter's image is that
    of :func:`~featvis_func.render`, but for the rounding that a batch of another size brings. A process may
    be killed at any moment: what it had committed stays, and it has at most one unit to do again.

    Args:
        model: as for :func:`~featvis_func.render`.
        layers: ``"all"``: every convolution and linear layer; or names, and patterns such as ``"inception4*.conv"``.
        filters: of each layer, as far as it has them. ``None``: all.
        out: a folder, on a file system that all processes of the run share.
        engine: one of :data:`~featvis_func.sweep.launchers.ENGINES`.
        batch_size: filters at a time: ``"auto"`` is 8 on a CPU and 64 elsewhere, halved where memory runs out.
        unit_size: filters that are committed together; default: the batch size.
        image_dtype: ``"uint8"`` or ``"float16"``, of the stored images.
        device: where to compute; default: where the model is. ``"cuda"``: of several processes, each takes its own.
        workers: for ``ray``: the most actors.
        threads: processors of each process or actor; default: what torch takes (``ray``: 2, or 1 beside a GPU).
        progress: a progress bar on the standard error. Default: if that is a terminal.
        **options: ``steps``, ``size``, ``seed``, ``views``, ``lr``, ``image``, ``optimizer``, ``tolerance``,
            ``redirect``, ``precision``, ``compile``, ``deterministic`` and ``snapshots``, as for
            :func:`~featvis_func.render`.

    Returns:
        How far the run is: see :class:`~featvis_func.sweep.store.Status`. Of the units that failed, why; they are
        tried again when the sweep is started again.

    Raises:
        ValueError: bad input, or a folder that holds another sweep.
        TooManyFailedError: more than 5% of all units failed.
        OSError: the folder cannot be written.

    >>> import tempfile
    >>> sweep("texturenet", "head", [3, 5], out=tempfile.mkdtemp(), steps=2, size=32).complete
    True
    """
    rank = engines.rank_of(engine)
    found = load_model(model)
    if device is not None and engine != "ray":  # whose nodes may have what this one has not
        check_device(device)
    config, plans = _configured(found, layers, filters, batch_size, unit_size, image_dtype, device, options)
    threads = None if threads is None else check_int("threads", threads, 1)
    workers = None if workers is None else check_int("workers", workers, 1)
    folder = start_folder(whole_path(out), Run(config, plans))
    remove_abandoned(folder.path)
    if engine == "ray":
        cluster.run_on_ray(
            folder, found, device=None if device is None else str(device), workers=workers, threads=threads,
            progress=progress,
        )  # fmt: skip
        return read_status(folder)
    where = engines.own_device(device, rank)
    worker = Worker(folder, renderers(found, config, device=where), seed=config["render"]["seed"])
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        engines.run_units(folder, worker, rank, progress=progress)
    finally:
        torch.set_num_threads(before)
    status = read_status(folder)
    if engine == "torchrun" and status.failed:
        engines.wait_for_others(folder, folder.run.units)
        status = read_status(folder)
    return status


def dry_run(
    model: str | nn.Module | Model,
    layers: str | Iterable[str] = "all",
    filters: Iterable[int] | int | None = None,
    *,
    batch_size: int | str = "auto",
    unit_size: int | None = None,
    image_dtype: str = "uint8",
    device: str | torch.device | None = None,
    **options: Unpack[RenderOptions],
) -> DryRun:
    """What :func:`sweep` would render, and about how long one worker would take: writes nothing.

    Args: as for :func:`sweep`.

    Returns:
        The layers and their units, and an estimate from three steps of up to three layers.

    Raises:
        ValueError: bad input.
    """
    found = load_model(model)
    config, plans = _configured(found, layers, filters, batch_size, unit_size, image_dtype, device, options)
    probed = {**config, "render": {**config["render"], "compile": "no"}}
    return DryRun(
        plans, estimate(plans, renderers(found, probed, device=device), itemsize=DTYPES[image_dtype].itemsize)
    )


def _configured(
    model: Model,
    layers: str | Iterable[str],
    filters: Iterable[int] | int | None,
    batch_size: int | str,
    unit_size: int | None,
    image_dtype: str,
    device: str | torch.device | None,
    options: RenderOptions,
) -> tuple[dict[str, Any], tuple[LayerPlan, ...]]:
    """A run's configuration, as JSON takes it, and its plan: all that can be wrong is found here."""
    unknown = set(options).difference(_DEFAULTS)
    if unknown:
        raise TypeError(f"sweep() got an unexpected keyword argument {min(unknown)!r}")
    check_name("image_dtype", image_dtype, DTYPES)
    if device is None:
        device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
    plans = plan_layers(model, layers, filters, batch_size=batch_size, unit_size=unit_size, device=device)
    config = {
        "model": model.name,
        "weights": model.weights,
        "fingerprint": fingerprint(model.module),
        "input_size": [int(side) for side in model.size],
        "mean": list(model.mean),
        "std": list(model.std),
        "layers": {plan.layer: ranges(plan.filters) for plan in plans},
        "batch_size": batch_size if batch_size == "auto" else int(batch_size),
        "unit_size": unit_size if unit_size is None else int(unit_size),
        "image_dtype": image_dtype,
        "render": _checked({**_DEFAULTS, **options}),
    }
    return config, plans


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the rendering, as JSON takes them; refused here, if not, and not by every unit."""
    for name, known in (("views", VIEWS), ("image", IMAGES), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
        if not isinstance(options[name], str):
            raise ValueError(f"a sweep takes {name} by name, one of {', '.join(known)}, got {options[name]!r}")
        check_name(name, options[name], known)
    steps, lr, tolerance, redirect, size = (options[name] for name in ("steps", "lr", "tolerance", "redirect", "size"))
    checked = {
        **options,
        "steps": check_int("steps", steps, 1),
        "seed": check_seed(options["seed"]),
        "lr": None if lr is None else float(lr),
        "tolerance": None if tolerance is None else float(tolerance),
        "redirect": None if redirect is None else check_int("redirect", redirect, 0),
        "compile": check_compile(options["compile"]),
        "size": None if size is None else list(_size(size)),
        "deterministic": bool(options["deterministic"]),
    }
    snapshots = checked.pop("snapshots")
    snapshots = 0 if snapshots is None else check_int("snapshots", snapshots, 0)
    snapshot_steps(checked["steps"], snapshots)
    if snapshots:  # without them, a configuration is what it was before there were any
        checked["snapshots"] = snapshots
    check_tolerance(checked["tolerance"])
    optimizer_for(checked["optimizer"], checked["lr"], checked["steps"])
    return checked


def _size(size: Any) -> tuple[int, int]:
    """Pixels, of whatever integer type."""
    sides = (
        [check_int("size", side) for side in size] if isinstance(size, tuple | list) else [check_int("size", size)] * 2
    )
    return check_size((sides[0], sides[-1]) if len(sides) == 2 else tuple(sides))  # pyright: ignore[reportArgumentType]
