"""A sweep on a Ray cluster: one task per unit, on actors that hold the model; nodes may come and go."""

import logging
import warnings
from collections import Counter
from typing import Any

import torch

from featvis_func.backbone.hooks import private_copy
from featvis_func.models import Model
from featvis_func.sweep.launchers import Rank, check_failures, forget_failures, watched
from featvis_func.sweep.layout import Folder, log_event
from featvis_func.sweep.plan import Unit
from featvis_func.sweep.shard import record_failure
from featvis_func.sweep.worker import ATTEMPTS, Done, Worker, pending, renderers

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
        device: where to compute, default: where the model is; of ``"cuda"`` ones, each actor takes one.
        workers: the most actors; default: as many as the cluster's processors or GPUs allow.
        threads: processors of each actor; default: 1 per GPU, else 2.
        progress: as for :func:`~featvis_func.sweep.launchers.run_units`.

    Raises:
        ValueError: Ray is not installed.
        TooManyFailedError: too many units failed.
        RuntimeError: actors end before they have begun, on all nodes.
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
    where = device or next((p.device for p in model.module.parameters()), "cpu")
    gpus = 1 if torch.device(where).type == "cuda" else 0
    cores = threads or (1 if gpus else 2)
    kind = ray.remote(num_cpus=cores, num_gpus=gpus, max_restarts=0)(_Renderer)
    device = "cuda" if gpus else device  # the only one that an actor sees is its own, whatever its number
    # From a GPU, only a process that has one could read it; and the user's stays where it is.
    shared = ray.put(model._replace(module=private_copy(model.module, "cpu")))
    units = folder.run.units
    waiting = pending(folder, units)[::-1]
    forget_failures(folder, waiting)
    total = len(waiting)
    running: dict[Any, tuple[Any, Unit | None]] = {}  # a result to come -> the actor, and what it does
    failed = finished = stillborn = 0
    losses: Counter[Unit] = Counter()

    def room() -> int:
        """How many actors the cluster can hold, now; at least the one that waits for a node, or calls for one."""
        return max(1, sum(_room(node, cores, gpus) for node in ray.nodes() if node["Alive"]))

    if total and not any(_room(node, cores, gpus) for node in ray.nodes() if node["Alive"]):
        asked = f"{cores} processors" + (" and a GPU" if gpus else "")
        warnings.warn(f"no node of the cluster has {asked} for an actor; waiting for one", stacklevel=4)
    with watched(folder, Rank(), progress=progress) as report:
        while finished < total:
            places = room()
            while len(running) < min(workers or places, places, total - finished):
                actor = kind.remote(folder, shared, device, cores)
                running[actor.ready.remote()] = actor, None  # which may wait for its place, and has no work yet
            ready, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
            for result in ready:
                actor, unit = running.pop(result)
                try:
                    done = ray.get(result)
                    stillborn = 0
                except lost as error:
                    log_event(folder.path, "lost", unit=unit and unit.name, error=type(error).__name__)
                    if unit is None:
                        stillborn += 1
                        if stillborn > ATTEMPTS * places:
                            why = str(error).strip().splitlines()[-1]
                            raise RuntimeError(f"Ray's actors end before they begin: {why}") from error
                        continue
                    losses[unit] += 1
                    if losses[unit] < ATTEMPTS:
                        waiting.append(unit)
                        continue
                    # Whose fault it was nobody knows; but a unit that kills its process shall not do so for ever.
                    why = f"{type(error).__name__}: its process was lost, {ATTEMPTS} times"
                    record_failure(folder, unit, why, ATTEMPTS)
                    actor, done = None, Done(unit, "failed", 0.0, why)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                if unit is not None:
                    finished += 1
                    if done.outcome == "rendered" and not folder.sidecar(unit).exists():
                        raise OSError(f"{str(folder.path)!r} is not a folder that all nodes share, at the same path")
                    report(done)
                    failed += done.outcome == "failed"
                    check_failures(failed, len(units), done.error)
                if waiting and actor is not None:
                    following = waiting.pop()
                    running[actor.work.remote(following)] = actor, following


def _room(node: dict[str, Any], cores: int, gpus: int) -> int:
    """How many actors a node can hold."""
    resources = node["Resources"]
    places = int(resources.get("CPU", 0) // cores)
    return min(places, int(resources.get("GPU", 0) // gpus)) if gpus else places
