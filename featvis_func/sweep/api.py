"""The one-call door to whole layers and networks."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from featvis_func.engine.device import check_device
from featvis_func.io.atomic import absolute_path, remove_abandoned
from featvis_func.io.filter_spec import ranges
from featvis_func.models import Model, fingerprint, load_model
from featvis_func.rendering.options import OPTIONS, SWEEP_OPTIONS, RenderOptions
from featvis_func.rendering.renderer import check_own_parts
from featvis_func.sweep import launchers as engines
from featvis_func.sweep import ray_engine as cluster
from featvis_func.sweep.layout import Run, start_folder
from featvis_func.sweep.plan import Estimate, LayerPlan, estimate, plan_layers
from featvis_func.sweep.shard import DTYPES
from featvis_func.sweep.validate import Status, read_status
from featvis_func.sweep.worker import Worker, renderers
from featvis_func.validation import check_int, check_name


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
    **options: Any,
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
        **options: as for :func:`featvis_func.render`, but for ``saliency``, which is not stored, and the arguments
            above; transforms, image and optimizer by name only. ``retain_memory`` is on by default.

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
    checked = _options(options, "sweep")
    model = load_model(model)
    if device is not None and engine != "ray":  # whose nodes may have what this one has not
        check_device(device)
    config, plans = _configure(model, layers, filters, batch_size, unit_size, image_dtype, device, checked)
    threads = None if threads is None else check_int("threads", threads, 1)
    workers = None if workers is None else check_int("workers", workers, 1)
    folder = start_folder(absolute_path(out), Run(config, plans))
    remove_abandoned(folder.path)
    if engine == "ray":
        cluster.run_on_ray(
            folder, model, device=None if device is None else str(device), workers=workers, threads=threads,
            progress=progress,
        )  # fmt: skip
        return read_status(folder)
    where = engines.own_device(device, rank)
    worker = Worker(
        folder,
        renderers(model, config, device=where, retain_memory=checked.retain_memory),
        seed=config["render"]["seed"],
    )
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
    **options: Any,
) -> DryRun:
    """What :func:`sweep` would render, and about how long one worker would take: writes nothing.

    Args: as for :func:`sweep`.

    Returns:
        The layers and their units, and an estimate from three steps of up to three layers.

    Raises:
        ValueError: bad input.
    """
    checked = _options(options, "dry_run")
    model = load_model(model)
    config, plans = _configure(model, layers, filters, batch_size, unit_size, image_dtype, device, checked)
    probed = {**config, "render": {**config["render"], "compile": "no"}}
    return DryRun(
        plans,
        estimate(
            plans, renderers(model, probed, device=device, retain_memory=False), itemsize=DTYPES[image_dtype].itemsize
        ),
    )


def _configure(
    model: Model,
    layers: str | Iterable[str],
    filters: Iterable[int] | int | None,
    batch_size: int | str,
    unit_size: int | None,
    image_dtype: str,
    device: str | torch.device | None,
    options: RenderOptions,
) -> tuple[dict[str, Any], tuple[LayerPlan, ...]]:
    """A run's configuration, as JSON holds it, and its plan: bad input is refused here, and not by every unit."""
    check_name("image_dtype", image_dtype, DTYPES)
    for name, value in options.to_json(SWEEP_OPTIONS).items():
        if value == "custom":
            raise ValueError(f"a sweep takes {name} by name, not an object, got {getattr(options, name)!r}")
    check_own_parts(options)
    if device is None:
        device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
    plans = plan_layers(model, layers, filters, batch_size=batch_size, unit_size=unit_size, device=device)
    recorded = tuple(name for name in SWEEP_OPTIONS if OPTIONS[name].recorded)
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
        "render": options.to_json(recorded),
    }
    return config, plans


def _options(options: dict[str, Any], function: str) -> RenderOptions:
    return RenderOptions.of({"retain_memory": True, **options}, function=function, names=SWEEP_OPTIONS)
