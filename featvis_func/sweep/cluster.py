"""A sweep on a Ray cluster: one task per unit, on actors that hold the model; nodes may come and go."""

import logging
from typing import Any

import torch

from featvis_func.models import Model
from featvis_func.sweep.engines import Rank, check_failures, forget_failures, watched
from featvis_func.sweep.plan import Unit
from featvis_func.sweep.store import Folder, log_event
from featvis_func.sweep.worker import Done, Worker, pending, renderers

# How long to wait for a result before the cluster is looked at again.
_LOOK_SECONDS = 2.0


class _Renderer:
    """What an actor holds: the model, and what the current layer takes."""

    def __init__(self, folder: Folder, model: Model, device: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        make = renderers(model, folder.run.config, device=device)
        self._worker = Worker(folder, make, seed=folder.run.config["render"]["seed"])

    def ready(self) -> None:
        """Returns once the actor is up."""

    def work(self, unit: Unit) -> Done:
        return self._worker(unit)


def run_on_ray(
    folder: Folder,
    model: Model,
    *,
    device: str | None,
    workers: int | None = None,
    threads: int | None = None,
    progress: bool | None = None,
) -> None:
    """Renders the units that are not done on all nodes of a Ray cluster.

    A unit whose node or process is lost goes to another; nodes that join are put to work.

    Args:
        folder: of the run, on a file system that all nodes share, at the same path.
        model: sent to each actor once.
        device: where to compute: of a ``"cuda"`` one, each actor takes one.
        workers: the most actors; default: as many as the cluster's processors or GPUs allow.
        threads: processors of each actor; default: 1 per GPU, else 2.
        progress: as for :func:`~featvis_func.sweep.engines.run_units`.

    Raises:
        ValueError: Ray is not installed.
        TooManyFailedError: too many units failed.
        OSError: the folder cannot be written.
    """
    try:
        import ray
        from ray.exceptions import RayActorError
    except ImportError as error:
        raise ValueError("the engine ray needs the package ray: pip install 'featvis-func[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        _run(ray, RayActorError, folder, model, device, workers, threads, progress)
    finally:
        if started:
            ray.shutdown()


def _run(
    ray: Any,
    lost: type[Exception],
    folder: Folder,
    model: Model,
    device: str | None,
    workers: int | None,
    threads: int | None,
    progress: bool | None,
) -> None:
    gpus = 1 if torch.device(device or "cpu").type == "cuda" else 0
    cores = threads or (1 if gpus else 2)
    kind = ray.remote(num_cpus=cores, num_gpus=gpus, max_restarts=0)(_Renderer)
    shared = ray.put(model._replace(module=model.module.cpu()) if gpus else model)
    units = folder.run.units
    waiting = pending(folder, units)[::-1]
    forget_failures(folder, waiting)
    total = len(waiting)
    running: dict[Any, tuple[Any, Unit | None]] = {}  # a result to come -> the actor, and what it does
    failed = finished = 0

    def hire() -> None:
        """As many actors as there is room for; those that wait for a place have no work yet."""
        room = sum(_room(node, cores, gpus) for node in ray.nodes() if node["Alive"])
        while len(running) < min(workers or room, room, total - finished):
            actor = kind.remote(folder, shared, device, cores)
            running[actor.ready.remote()] = actor, None

    with watched(folder, Rank(), progress=progress) as report:
        while finished < total:
            hire()
            ready, _ = ray.wait(list(running), timeout=_LOOK_SECONDS) if running else ([], [])
            for result in ready:
                actor, unit = running.pop(result)
                try:
                    done = ray.get(result)
                except lost as error:
                    log_event(folder.path, "lost", unit=unit and unit.name, error=type(error).__name__)
                    if unit is not None:
                        waiting.append(unit)
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from error
                if unit is not None:
                    finished += 1
                    report(done)
                    failed += done.outcome == "failed"
                    check_failures(failed, len(units))
                if waiting:
                    following = waiting.pop()
                    running[actor.work.remote(following)] = actor, following


def _room(node: dict[str, Any], cores: int, gpus: int) -> int:
    """How many actors a node can hold."""
    resources = node["Resources"]
    places = int(resources.get("CPU", 0) // cores)
    return min(places, int(resources.get("GPU", 0) // gpus)) if gpus else places
