"""Engine for Ray clusters: one task per unit, on actors that hold the model. Nodes may join and leave."""

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from featvis_func.models import Model, device_for
from featvis_func.models.copying import private_copy
from featvis_func.objective import Objective
from featvis_func.sweep.launchers import Rank, check_failures, forget_failures, watched
from featvis_func.sweep.layout import Folder, log_event
from featvis_func.sweep.plan import Unit
from featvis_func.sweep.renderers import renderers
from featvis_func.sweep.shard import record_failure
from featvis_func.sweep.worker import ATTEMPTS, Done, Worker, pending

# How long to wait for a result before checking for new nodes.
_POLL_SECONDS = 2.0


class _Renderer:
    """Actor that holds the model and the renderer of the current layer."""

    def __init__(
        self, folder: Folder, shared: list[Any], import_path: list[str], device: str | None, threads: int
    ) -> None:
        import ray

        # The class of the model may be defined in a folder of the user's. In a list, because Ray would otherwise read
        # the model before this constructor runs.
        sys.path.extend(entry for entry in import_path if entry not in sys.path)
        model: Model
        model, objectives = ray.get(shared[0])
        torch.set_num_threads(threads)
        make = renderers(model, folder.run.config, folder.run.plans, objectives=objectives, device=device)
        self._worker = Worker(folder, make, seed=folder.run.config["render"]["seed"])

    def ready(self) -> None:
        """Return as soon as the actor has started."""

    def work(self, unit: Unit) -> Done:
        """Render a unit."""
        return self._worker(unit)


def run_on_ray(
    folder: Folder,
    model: Model,
    *,
    objectives: Mapping[str, Objective] | None = None,
    device: str | None,
    workers: int | None = None,
    threads: int | None = None,
    progress: bool | None = None,
) -> None:
    """Render the units that are not done on all nodes of a Ray cluster.

    A unit whose node or process is lost is given to another actor. Nodes that join during the run are used.

    Args:
        folder: The sweep's folder, on a file system that all nodes mount at the same path.
        model: The model; it is sent to each actor once.
        objectives: Label of each family of objectives -> its objective; sent likewise.
        device: Device to compute on. Default: the device of the model. With ``"cuda"``, each actor takes one GPU.
        workers: Maximum number of actors. Default: as many as the processors or GPUs of the cluster allow.
        threads: Number of processors of each actor. Default: 1 with a GPU, otherwise 2.
        progress: As for :func:`~featvis_func.sweep.launchers.run_units`.

    Raises:
        ValueError: Ray is not installed.
        TooManyFailedError: Too many units failed.
        RuntimeError: Actors repeatedly die before they have started.
        OSError: The folder cannot be written, or the nodes do not share it.
    """
    try:
        import ray
        from ray.exceptions import RayActorError
    except ImportError as error:
        raise ValueError("engine 'ray' needs the package ray: pip install 'featvis-func[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        _run_actors(ray, RayActorError, folder, model, objectives or {}, device, workers, threads, progress)
    finally:
        if started:
            ray.shutdown()


def _run_actors(
    ray: Any,
    actor_error: type[Exception],
    folder: Folder,
    model: Model,
    objectives: Mapping[str, Objective],
    device: str | None,
    workers: int | None,
    threads: int | None,
    progress: bool | None,
) -> None:
    """Schedule the units on actors; ``ray`` is the module, ``actor_error`` the type of error of a lost actor."""
    gpus = 1 if device_for(model, device).type == "cuda" else 0
    cores = threads or (1 if gpus else 2)
    actor_class = ray.remote(num_cpus=cores, num_gpus=gpus, max_restarts=0)(_Renderer)
    device = "cuda" if gpus else device  # each actor sees only its own GPU, whatever its number
    # A copy on the CPU, because a process without a GPU cannot unpickle CUDA tensors; the user's module is not moved.
    shared = ray.put((model._replace(module=private_copy(model.module, "cpu")), dict(objectives)))
    units = folder.run.units
    waiting = pending(folder, units)[::-1]
    forget_failures(folder, waiting)
    total = len(waiting)
    running: dict[Any, tuple[Any, Unit | None]] = {}  # pending Ray result -> its actor, and its unit
    failed = finished = dead_on_start = 0
    losses: Counter[Unit] = Counter()

    def capacity() -> int:
        """How many actors the cluster can hold now; at least 1, so that an actor waits for (or requests) a node."""
        return max(1, sum(_capacity(node, cores, gpus) for node in ray.nodes() if node["Alive"]))

    if total and not any(_capacity(node, cores, gpus) for node in ray.nodes() if node["Alive"]):
        needed = f"{cores} processors" + (" and a GPU" if gpus else "")
        warnings.warn(f"no node of the cluster has {needed} for an actor; waiting for one", stacklevel=4)
    with watched(folder, Rank(), progress=progress) as report:
        while finished < total:
            places = capacity()
            while len(running) < min(workers or places, places, total - finished):
                actor = actor_class.remote(folder, [shared], sys.path, device, cores)
                running[actor.ready.remote()] = actor, None  # has no unit until it has started
            ready, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for result in ready:
                actor, unit = running.pop(result)
                try:
                    done = ray.get(result)
                    dead_on_start = 0
                except actor_error as error:
                    log_event(folder.path, "lost", unit=unit and unit.name, error=type(error).__name__)
                    if unit is None:
                        dead_on_start += 1
                        if dead_on_start > ATTEMPTS * places:
                            reason = str(error).strip().splitlines()[-1]
                            raise RuntimeError(f"Ray's actors die before they have started: {reason}") from error
                        continue
                    losses[unit] += 1
                    if losses[unit] < ATTEMPTS:
                        waiting.append(unit)
                        continue
                    # The cause is unknown, but a unit that kills its process must not be tried without end.
                    reason = f"{type(error).__name__}: the process that rendered the unit was lost {ATTEMPTS} times"
                    record_failure(folder, unit, reason, ATTEMPTS)
                    actor, done = None, Done(unit, "failed", 0.0, reason)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                if unit is not None:
                    finished += 1
                    if done.outcome == "rendered" and not folder.sidecar(unit).exists():
                        raise OSError(f"not all nodes share the folder {str(folder.path)!r} at the same path")
                    report(done)
                    failed += done.outcome == "failed"
                    check_failures(failed, len(units), done.error)
                if waiting and actor is not None:
                    next_unit = waiting.pop()
                    running[actor.work.remote(next_unit)] = actor, next_unit


def _capacity(node: dict[str, Any], cores: int, gpus: int) -> int:
    """How many actors a node can hold."""
    resources = node["Resources"]
    places = int(resources.get("CPU", 0) // cores)
    return min(places, int(resources.get("GPU", 0) // gpus)) if gpus else places
