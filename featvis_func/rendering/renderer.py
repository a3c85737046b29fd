"""A model, a layer and options, made ready once: what then renders any of the layer's filters, any number of times."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featvis_func import image as images
from featvis_func import objective as objectives
from featvis_func import transform as transforms
from featvis_func.backbone.features import Features, compiled_weights, device_of, make_features
from featvis_func.engine.batching import RunResult, check_tolerance, run_batched
from featvis_func.engine.device import (
    CPU_BATCH_SIZE,
    check_compile,
    deterministic_algorithms,
    probe_batch_size,
    select_step,
)
from featvis_func.engine.forward import check_layers
from featvis_func.engine.snapshots import snapshot_steps
from featvis_func.engine.step import Step, filter_keys, init_state, make_step
from featvis_func.io.filter_spec import split_layer
from featvis_func.models import Model, load_model
from featvis_func.objective import Objective
from featvis_func.random import key
from featvis_func.rendering.options import IMAGES, optimizer_for
from featvis_func.rendering.presets import REDIRECT, VIEWS
from featvis_func.rendering.presets import views as views_by_name
from featvis_func.rendering.result import Result
from featvis_func.types import Image, Optimizer, Params, State, Target, Transform, Weights
from featvis_func.validation import check_filters, check_int, check_name, check_seed, check_size


class Renderer(NamedTuple):
    """One layer's filters, ready to be rendered. Make one with :func:`make_renderer`."""

    filters: tuple[int, ...]
    """All that it was made for."""
    slots: int
    """Filters at a time: every batch has this width, so that the step is compiled once."""
    config: dict[str, Any]
    """What its images depend on, as JSON takes it."""
    step: Step
    weights: Weights
    start: Callable[[Sequence[int], int], tuple[State, Target]]
    """(filter numbers, seed) -> their state before the first step, and their targets."""
    together: bool = False
    """Whether its filters depend on each other, by the objective or by what their images have in common."""
    decode: Callable[[Params], Tensor] | None = None
    """One filter's parameters -> its image, for snapshots."""

    def __call__(
        self,
        filters: Iterable[int] | int | None = None,
        *,
        seed: int | None = None,
        progress: bool | Callable[[int], object] | None = False,
    ) -> Result:
        """Renders filters: the same images whichever others are rendered with them, unless they belong together.

        Args:
            filters: among ``self.filters``; ``None``: all of them.
            seed: in ``[0, 2**64)``; default: what the renderer was made with.
            progress: whether to show a bar on the standard error, ``None``: if that is a terminal; or what is called
                with the number of steps done, as by :func:`~featvis_func.run_batched`.

        Returns:
            A :class:`~featvis_func.Result`, on the CPU.

        Raises:
            ValueError: a filter that the renderer was not made for.

        >>> renderer = make_renderer("texturenet", "head", steps=2, size=32)
        >>> renderer([3]).images.shape, renderer([5, 3]).filters
        (torch.Size([1, 3, 32, 32]), (5, 3))
        """
        numbers = list(self.filters) if filters is None else check_filters(filters)
        unknown = set(numbers).difference(self.filters)
        if unknown:
            raise ValueError(f"this renderer was made for other filters than {min(unknown)}")
        start = self.config["seed"] if seed is None else check_seed(seed)
        config = {**self.config, "seed": start}
        steps = config["steps"]
        hidden = callable(progress) or (progress is not None and not progress)
        bar = tqdm(
            total=steps * len(numbers),
            desc=config["layer"],
            unit="step",
            leave=False,
            disable=hidden or (None if progress is None else False),
        )
        with bar, deterministic_algorithms(config["deterministic"]):
            outcome = run_batched(
                self.step,
                self.weights,
                lambda chosen: self.start(chosen, start),
                numbers,
                steps=steps,
                slots=len(numbers) if self.together else self.slots,
                pad=True,
                together=self.together,
                tolerance=config["tolerance"],
                progress=progress if callable(progress) else bar.update,
                snapshots=config.get("snapshots", 0),
                decode=self.decode,
            )
        return _result(outcome, numbers, {**config, "slots": outcome.slots})


def make_renderer(
    model: str | nn.Module | Model,
    objective: str | Objective,
    filters: Iterable[int] | int | None = None,
    *,
    steps: int = 32,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    views: str | Transform = "default",
    lr: float | None = None,
    image: str | Image = "fourier",
    optimizer: str | Optimizer = "default",
    batch_size: int | str = "auto",
    tolerance: float | None = None,
    redirect: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
    features: Features | None = None,
    compile: bool | str = "auto",
    deterministic: bool = False,
    saliency: bool = False,
    snapshots: int | None = None,
) -> Renderer:
    """Traces the model up to a layer and composes the step, once for any number of renderings.

    Args: as for :func:`~featvis_func.render`. ``filters``: all that will be rendered, in one call or in
        many; by their number ``"auto"`` judges whether compiling pays.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.
    """
    found = load_model(model)
    goal, filters = parse_objective(objective, filters)
    if not goal.layers:
        raise ValueError(f"{goal} reads no layer of the model; add an objective that does")
    # Whatever can be told now is not left until after the model was traced.
    if not isinstance(views, str | Transform):
        raise ValueError(f"views must be one of {', '.join(VIEWS)} or a Transform, got {views!r}")
    if isinstance(views, str):
        check_name("views", views, VIEWS)
    if not isinstance(image, Image):
        check_name("image parameterisation", image, IMAGES)
    steps, seed = check_int("steps", steps, 1), check_seed(seed)
    snapshots = 0 if snapshots is None else check_int("snapshots", snapshots, 0)
    snapshot_steps(steps, snapshots)
    redirect = None if redirect is None else check_int("redirect", redirect, 0)
    if batch_size != "auto":
        batch_size = check_int("batch_size", batch_size, 1)
    tolerance = None if tolerance is None else float(tolerance)
    check_tolerance(tolerance)
    compile = check_compile(compile)
    lr = None if lr is None else float(lr)
    rule = optimizer_for(optimizer, lr, steps)
    wanted = None if filters is None else check_filters(filters)
    asked = check_size(found.size if size is None else size)
    if features is None:
        features = make_features(found, goal.layers, device=device, precision=precision)
    check_layers(goal, features)
    if redirect is None:
        redirect = REDIRECT if optimizer == "default" and features.redirected is not None else 0
    where = device_of(features, device)
    numbers = _filters(wanted, goal, features)
    parameterisation = (
        image if isinstance(image, Image) else IMAGES[image](asked, channels=found.channels, device=where)
    )
    decoded = parameterisation.decode(parameterisation.init(key(seed, device=where)))
    channels, h, w = decoded.shape
    if channels not in (found.channels, found.channels + 1):
        raise ValueError(f"the image has {channels} channels; {found.name} takes {found.channels}")
    view = views
    if isinstance(view, str):
        view = views_by_name(view, image=(h, w), size=found.size, deterministic=deterministic)
        if channels > found.channels:  # an opacity, which shows only over something
            view = transforms.chain(transforms.over_background(), view)
    shown = view.apply(decoded, view.draw(key(seed, device=where))).shape
    if len(shown) > 4 or shown[-3:] != (found.channels, *found.size):
        raise ValueError(f"the views must be {(found.channels, *found.size)} as {found.name} takes, got {tuple(shown)}")
    transform = transforms.chain(view, transforms.normalize(found.mean, found.std, device=where))
    if goal.picture is not None and goal.picture.shape != decoded.shape:
        raise ValueError(f"the picture of {goal} is {tuple(goal.picture.shape)}, the images {tuple(decoded.shape)}")
    plain = make_step(features, parameterisation, transform, goal, rule, redirect=redirect, saliency=saliency)
    pixels = len(numbers) * steps * h * w
    step = select_step(plain, compile, device=where, pixels=pixels, exported=features.exported, name=found.name)
    weights = features.weights if step is plain else compiled_weights(features)
    layer = features.paths[goal.layers[0]]

    def start(chosen: Sequence[int], seed: int) -> tuple[State, Target]:
        keys = filter_keys(seed, layer, chosen, device=where)
        state = init_state(features, parameterisation, goal, rule, keys, saliency=saliency)
        return state, torch.tensor(list(chosen), dtype=torch.int64, device=where)

    slots = batch_size if isinstance(batch_size, int) else CPU_BATCH_SIZE
    together = goal.batch_score is not None or parameterisation.share_params is not None
    if together and (tolerance is not None or (batch_size != "auto" and slots < len(numbers))):
        raise ValueError(
            f"the {len(numbers)} images of {goal} belong together: they need one batch, and no tolerance; got"
            f" batch_size={batch_size}, tolerance={tolerance}"
        )
    if together:
        slots = len(numbers)
    elif batch_size == "auto" and where.type == "cuda" and not deterministic:
        slots = probe_batch_size(plain, features.weights, lambda some: start(some, seed), numbers, device=where)
    dtype = next((w.dtype for w in features.weights.values() if w.is_floating_point()), torch.float32)
    config = {
        "model": found.name,
        "weights": found.weights,
        "objective": repr(goal),
        "layer": layer,
        "steps": steps,
        "size": [h, w],
        "input_size": list(found.size),
        "mean": list(found.mean),
        "std": list(found.std),
        "seed": seed,
        "views": views if isinstance(views, str) else "custom",
        "lr": lr,
        "image": image if isinstance(image, str) else "custom",
        "optimizer": optimizer if isinstance(optimizer, str) else "custom",
        "batch_size": batch_size,
        "tolerance": tolerance,
        "redirect": redirect,
        "precision": str(dtype).removeprefix("torch."),
        "compile": compile,
        "deterministic": deterministic,
        "device": where.type,
        **({"saliency": True} if saliency else {}),
        **({"snapshots": snapshots} if snapshots else {}),
    }
    width = min(slots, len(numbers))
    return Renderer(tuple(numbers), width, config, step, weights, start, together, parameterisation.decode)


def parse_objective(
    objective: str | Objective, filters: Iterable[int] | int | None
) -> tuple[Objective, Iterable[int] | int | None]:
    """An objective, and the filters asked for, from what :func:`~featvis_func.render` is given."""
    if isinstance(objective, str):
        layer, numbers, stated = split_layer(objective)
        if stated and filters is not None:
            raise ValueError(f"the filters are given twice: by {objective!r} and by filters=")
        return objectives.channel(layer), numbers if stated else filters
    if not isinstance(objective, Objective):
        raise ValueError(f"expected the name of a layer or an Objective, got {objective!r}")
    return objective, filters


def _filters(numbers: list[int] | None, goal: Objective, features: Features) -> list[int]:
    """The filter numbers, checked against the layers in which they pick a channel; ``None`` means all."""
    widths = {n: features.shapes[n][objectives.feature_axis(features.shapes[n])] for n in goal.targeted}
    if numbers is None:
        return list(range(min(widths.values()) if widths else goal.variants or 1))
    if goal.variants is not None and max(numbers) >= goal.variants:
        raise ValueError(f"{goal} describes images 0 to {goal.variants - 1}, got {max(numbers)}")
    for name, width in widths.items():
        outside = [f for f in numbers if not 0 <= f < width]
        if outside:
            raise ValueError(f"layer {name!r} has filters 0 to {width - 1}, got {outside[0]}")
    for number in (min(numbers), max(numbers)):
        if not 0 <= number < 2**32:
            raise ValueError(f"filter numbers must be in [0, 2**32), got {number}")
    return numbers


def _result(outcome: RunResult, filters: Sequence[int], config: dict[str, Any]) -> Result:
    best, info = outcome.best, outcome.info
    taken = torch.arange(len(info.score))[:, None] < outcome.steps
    alive, finite = info.alive.any(0).tolist(), (info.finite | ~taken).all(0).tolist()
    status = tuple("nonfinite" if not f else "ok" if a else "dead" for a, f in zip(alive, finite, strict=True))
    return Result(
        images=best.image.float(),
        activations=best.activation.float(),
        scores=best.score.float(),
        best_step=best.step,
        filters=tuple(filters),
        status=status,
        history=info.score.float(),
        steps=outcome.steps,
        saliency=outcome.saliency,
        snapshots=outcome.snapshots,
        config=config,
    )
