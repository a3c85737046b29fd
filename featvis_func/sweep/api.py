"""The one-call interface to sweeps: render whole layers and networks into a folder."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from featvis_func.backbone.listing import layer_shapes
from featvis_func.engine.device import check_device
from featvis_func.io.atomic import absolute_path, remove_abandoned
from featvis_func.io.display import check_shown
from featvis_func.io.filter_spec import ranges
from featvis_func.models import Model, device_for, fingerprint, load_model
from featvis_func.objective import Objective, feature_axis
from featvis_func.rendering.input_size import image_size, with_input_size
from featvis_func.rendering.options import OPTIONS, SWEEP_OPTIONS, RenderOptions
from featvis_func.rendering.resolve import check_own_parts, check_presets
from featvis_func.sweep import launchers, ray_engine
from featvis_func.sweep.estimate import Estimate, estimate
from featvis_func.sweep.families import Requested, describe_families, is_layer, split_request, write_members
from featvis_func.sweep.layout import Run, start_folder
from featvis_func.sweep.plan import LayerPlan, plan_family, plan_layers
from featvis_func.sweep.renderers import renderers
from featvis_func.sweep.shard import DTYPES
from featvis_func.sweep.validate import Status, read_status
from featvis_func.sweep.worker import Worker, pending
from featvis_func.validation import check_filters, check_int, check_name


class DryRun(NamedTuple):
    """The plan and the estimated cost of a sweep."""

    plans: tuple[LayerPlan, ...]
    """One per layer."""
    estimate: Estimate


def sweep(
    model: str | nn.Module | Model,
    layers: Requested | Iterable[Requested] | Mapping[str, Requested] = "all",
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
    """Render whole layers or networks into a folder. If started again, continue where the folder ends.

    A folder holds one configuration, which never changes, and finished work is not repeated. A filter's image is that
    of :func:`~featvis_func.render`, up to the rounding that depends on the batch size and on compiling: the model is
    traced once, and layers share compiled steps where that saves time, see :mod:`featvis_func.sweep.groups`. The
    process may be killed at any moment: committed units stay, and at most those in progress are rendered again.

    Args:
        model: as for :func:`~featvis_func.render`.
        layers: ``"all"`` for every convolution and linear layer; or names, and patterns such as ``"inception4*.conv"``.
            Also families of objectives, of which each member is rendered, see :mod:`featvis_func.objective.families`:
            an :class:`~featvis_func.Objective`, or text such as ``"directions:blocks.5:dictionary.safetensors"``, see
            :mod:`featvis_func.rendering.spec`. Several together in a list, or with labels of your own in a dictionary.
        filters: filter numbers in each layer, as far as the layer has them, and members of each family. ``None``: all.
        out: a folder, on a file system that all processes of the sweep share.
        engine: one of :data:`~featvis_func.sweep.launchers.ENGINES`.
        batch_size: filters at a time; ``"auto"`` is 16 on a CPU (8 with inputs of more than 256 x 256 pixels) and 64
            elsewhere, halved where memory runs out.
        unit_size: filters that are committed together. Default: the batch size.
        image_dtype: dtype of the stored images, ``"uint8"`` or ``"float16"``.
        device: device to compute on. Default: where the model is. With ``"cuda"``, each of several processes takes a
            device of its own.
        workers: for ``ray``, the largest number of actors.
        threads: CPU threads of each process or actor. Default: torch's (for ``ray``: 2, or 1 with a GPU).
        progress: whether to show a progress bar on the standard error. Default: if that is a terminal.
        **options: as for :func:`featvis_func.render`, except ``saliency``, which is not stored, and the arguments
            above; transforms, image and optimizer by name only. ``retain_memory`` is on by default.

    Returns:
        The status of the sweep, see :class:`~featvis_func.sweep.store.Status`, with the reason for each unit that
        failed. These are tried again when the sweep is started again.

    Raises:
        ValueError: bad input, or a folder that holds another sweep.
        TypeError: an unknown option.
        TooManyFailedError: more than 5% of all units failed, not counting those of layers that cannot be rendered.
        OSError: the folder cannot be written to.

    >>> import tempfile
    >>> sweep("texturenet", "head", [3, 5], out=tempfile.mkdtemp(), steps=2, size=32).complete
    True
    """
    rank = launchers.rank_of(engine)
    checked = _options(options, "sweep")
    model = load_model(model)
    device = launchers.own_device(device, rank)  # before anything is allocated on the default device
    if device is not None and engine != "ray":  # The nodes of a cluster may have devices that this machine lacks.
        check_device(device)
    model = with_input_size(model, checked.size, stacklevel=3)
    config, plans, objectives = _configure(model, layers, filters, batch_size, unit_size, image_dtype, device, checked)
    threads = None if threads is None else check_int("threads", threads, 1)
    workers = None if workers is None else check_int("workers", workers, 1)
    folder = start_folder(absolute_path(out), Run(config, plans))
    remove_abandoned(folder.path)
    write_members(folder, objectives)
    if engine == "ray":
        ray_engine.run_on_ray(
            folder, model, objectives=objectives, device=None if device is None else str(device), workers=workers,
            threads=threads, progress=progress,
        )  # fmt: skip
        return read_status(folder)

    def remaining() -> Counter[str]:
        counts = Counter[str]()
        for unit in pending(folder, launchers.share(folder, rank)):
            counts[unit.layer] += len(unit.filters)
        return counts

    make = renderers(
        model, config, plans, objectives=objectives, device=device, retain_memory=checked.retain_memory,
        remaining=remaining,
    )  # fmt: skip
    background = device_for(model, device).type != "cpu"
    worker = Worker(folder, make, seed=config["render"]["seed"], background=background)
    threads_before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with launchers.current_device(device_for(model, device)):
            launchers.run_units(folder, worker, rank, progress=progress)
    finally:
        torch.set_num_threads(threads_before)
    status = read_status(folder)
    if engine == "torchrun" and status.failed:
        launchers.wait_for_others(folder, folder.run.units)
        status = read_status(folder)
    return status


def dry_run(
    model: str | nn.Module | Model,
    layers: Requested | Iterable[Requested] | Mapping[str, Requested] = "all",
    filters: Iterable[int] | int | None = None,
    *,
    batch_size: int | str = "auto",
    unit_size: int | None = None,
    image_dtype: str = "uint8",
    device: str | torch.device | None = None,
    **options: Any,
) -> DryRun:
    """Plan a sweep and estimate its cost on one worker, without writing anything.

    Args: as for :func:`sweep`.

    Returns:
        The plan, and an estimate from three steps of up to three layers.

    Raises:
        ValueError: bad input.
        TypeError: an unknown option.
    """
    checked = _options(options, "dry_run")
    model = with_input_size(load_model(model), checked.size, stacklevel=3)
    config, plans, objectives = _configure(model, layers, filters, batch_size, unit_size, image_dtype, device, checked)
    not_compiled = {**config, "render": {**config["render"], "compile": "no"}}
    make = renderers(model, not_compiled, plans, objectives=objectives, device=device, retain_memory=False)
    main_layers = {p.layer: objectives[p.layer].layers[0] if p.layer in objectives else p.layer for p in plans}
    shapes = layer_shapes(model, dict.fromkeys(main_layers.values()))
    positions = {
        name: math.prod(shapes[layer]) // shapes[layer][feature_axis(shapes[layer])]
        for name, layer in main_layers.items()
    }
    return DryRun(plans, estimate(plans, make.single, positions=positions, itemsize=DTYPES[image_dtype].itemsize))


def _configure(
    model: Model,
    layers: Requested | Iterable[Requested] | Mapping[str, Requested],
    filters: Iterable[int] | int | None,
    batch_size: int | str,
    unit_size: int | None,
    image_dtype: str,
    device: str | torch.device | None,
    options: RenderOptions,
) -> tuple[dict[str, Any], tuple[LayerPlan, ...], dict[str, Objective]]:
    """The configuration of a sweep, as JSON holds it, its plan, and the objectives of its families by their labels.

    Bad input raises an error here, before it can make every unit fail.
    """
    check_name("image_dtype", image_dtype, DTYPES)
    for name, value in options.to_json(SWEEP_OPTIONS).items():
        if value == "custom":
            raise ValueError(f"a sweep takes {name} by name, not an object, got {getattr(options, name)!r}")
    check_own_parts(options)
    check_shown(options.bands, model.channels, len(model.size))
    check_presets(options, model)
    if options.size is not None:  # recorded with all sides, which one number leaves to the model
        options = replace(options, size=image_size(options.size, model))
    where = device_for(model, device)
    filters = filters if filters is None else check_filters(filters)
    sizes: dict[str, Any] = {"batch_size": batch_size, "unit_size": unit_size, "device": where}
    names, families = split_request(model, layers)
    plans = () if families and not names else plan_layers(model, names, filters, **sizes)
    shapes = layer_shapes(model, dict.fromkeys(n for family in families.values() for n in family.objective.layers))
    for label, family in families.items():
        if family.filters is not None and filters is not None:
            raise ValueError(f"the members of {label!r} are given twice: with the family, and by filters=")
        chosen = family.filters if filters is None else filters
        if is_layer(family.objective):
            plans = (*plans, *plan_layers(model, family.objective.layers, chosen, **sizes))
            continue
        if any(label == plan.layer for plan in plans):
            raise ValueError(f"a layer and a family are both called {label!r}; give the family another label")
        if family.objective.group > 1 and options.tolerance is not None:
            raise ValueError(f"the images of {label!r} depend on each other and take no tolerance")
        known = family.objective.variants
        if filters is not None and known is not None and len(families) + bool(names) > 1:
            chosen = [number for number in filters if number < known] or filters  # as far as it has them
        plans = (*plans, plan_family(label, family.objective, shapes, model.size, chosen, **sizes))
    objectives = {label: family.objective for label, family in families.items() if not is_layer(family.objective)}
    if len({plan.layer for plan in plans}) < len(plans):
        raise ValueError("a layer is asked for twice")
    recorded = tuple(name for name in SWEEP_OPTIONS if OPTIONS[name].recorded)
    config = {
        "model": model.name,
        "weights": model.weights,
        "fingerprint": fingerprint(model.module),
        "input_size": [int(side) for side in model.size],
        "mean": list(model.mean),
        "std": list(model.std),
        **({"stated": list(model.stated)} if model.stated else {}),
        "layers": {plan.layer: ranges(plan.filters) for plan in plans},
        "batch_size": batch_size if batch_size == "auto" else int(batch_size),
        "unit_size": unit_size if unit_size is None else int(unit_size),
        "image_dtype": image_dtype,
        "render": options.to_json(recorded),
        **({"families": describe_families(objectives)} if objectives else {}),
    }
    return config, plans, objectives


def _options(options: dict[str, Any], function: str) -> RenderOptions:
    return RenderOptions.of({"retain_memory": True, **options}, function=function, names=SWEEP_OPTIONS)
