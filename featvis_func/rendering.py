"""The one-call door: from a model and a layer to one image per filter."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from featvis_func import image as images
from featvis_func import objective as objectives
from featvis_func import transform as transforms
from featvis_func.execution import CPU_SLOTS, compile_word, compiled_for, repeatable, slots_for_memory
from featvis_func.features import Features, make_features
from featvis_func.messages import check_name
from featvis_func.models import Model, load_model
from featvis_func.objective import Objective
from featvis_func.presets import OPTIMIZERS, VIEWS, default_optimizer, published_optimizer
from featvis_func.presets import views as views_by_name
from featvis_func.random import key
from featvis_func.result import Result
from featvis_func.slots import Outcome, check_tolerance, run_all
from featvis_func.step import check_layers, filter_keys, init_state, make_step
from featvis_func.types import Image, Optimizer, State, Target, Transform

IMAGES = {"fourier": images.fourier, "pixel": images.pixel}
"""The parameterisations that :func:`render` knows by name."""


def render(
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
    device: torch.device | str | None = None,
    precision: str = "auto",
    features: Features | None = None,
    compile: bool | str = "auto",
    deterministic: bool = False,
    progress: bool | None = None,
) -> Result:
    """One image per filter: what each looks for.

    A filter's image depends on the seed, the model, the layer, the filter and the options below, but not on which other
    filters are rendered, in which order or in which batches (up to the rounding of the backbone).

    Args:
        model: a module, a name (``"texturenet"``, ``"torchvision:NAME[@WEIGHTS]"``) or a
            :class:`~featvis_func.models.Model`; see :func:`~featvis_func.models.load_model`. Left exactly as it was.
        objective: the name of a layer, or the unique end of one, for the mean of each channel; or an
            :class:`~featvis_func.objective.Objective`.
        filters: filter numbers; ``None`` means all of the layer (for an objective that names its own channels: one
            image; numbers then give variants).
        steps: steps of ascent, at least 1; more give more activation at less saturation.
        size: pixels of the images, ``h = w`` or ``(h, w)``. Default: the model's input size.
        seed: in ``[0, 2**64)``.
        views: ``"default"``, ``"published"``, ``"lucid"``, ``"none"``, or a :class:`Transform` from the image to the
            model's input size, in ``[0, 1]``; normalisation is added.
        lr: learning rate; default: what the optimiser's preset says.
        image: ``"fourier"``, ``"pixel"``, or an :class:`Image`.
        optimizer: ``"default"`` or ``"published"`` (see :mod:`featvis_func.presets`), or an :class:`Optimizer`.
        batch_size: filters rendered at once, or all if there are fewer; the last batch is padded to the shape of the
            others. ``"auto"``: what measured fastest on a CPU (8), or fills the memory of a CUDA device (8 where the
            run shall be deterministic). Where memory runs out, half as many go on.
        tolerance: stops a filter once its best score has risen by no more than this share of itself over 8 steps; the
            next one takes its place in the batch. ``None``: every filter takes all steps.
        device: where to compute, such as ``"cuda"``. Default: where the model is.
        precision: of the backbone alone, one of :data:`~featvis_func.verification.PRECISIONS`. ``"auto"``: bfloat16 for
            a float32 model where the hardware has it.
        features: the model's, from :func:`~featvis_func.features.make_features`, so that a second call on a layer
            need not trace the model again. They hold the weights as they were, in their own precision.
        compile: whether to pass the step through ``torch.compile(fullgraph=True)``: ``True`` or ``"yes"``, ``False``
            or ``"no"``, ``"cudagraphs"`` (and replay it as a CUDA graph), or ``"auto"``: on CUDA, and on a CPU where
            the run is long enough to win back the compile time; eagerly where compiling fails.
        deterministic: bit-equal reruns on CUDA, too: samples the views by a slower route, under
            ``torch.use_deterministic_algorithms(True)``, which names what the model has that cannot be repeated. Holds
            for equal batch sizes. On a CPU reruns are bit-equal without it.
        progress: a progress bar on the standard error. Default: if that is a terminal.

    Returns:
        A :class:`~featvis_func.result.Result`, on the CPU.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.

    >>> result = render("texturenet", "head", [3, 5], steps=2, size=32)
    >>> result.images.shape, result.filters
    (torch.Size([2, 3, 32, 32]), (3, 5))
    """
    found = load_model(model)
    goal = objectives.channel(objective) if isinstance(objective, str) else objective
    if not isinstance(goal, Objective):
        raise ValueError(f"expected the name of a layer or an Objective, got {objective!r}")
    # Whatever can be told now is not left until after the model was traced.
    if not isinstance(views, str | Transform):
        raise ValueError(f"views must be one of {', '.join(VIEWS)} or a Transform, got {views!r}")
    if isinstance(views, str):
        check_name("views", views, VIEWS)
    if not isinstance(image, Image):
        check_name("image parameterisation", image, IMAGES)
    steps, seed = _whole("steps", steps, 1), _whole("seed", seed)
    if batch_size != "auto":
        batch_size = _whole("batch_size", batch_size, 1)
    tolerance = None if tolerance is None else float(tolerance)
    check_tolerance(tolerance)
    compile = compile_word(compile)
    key(seed)
    lr = None if lr is None else float(lr)
    rule = _optimizer(optimizer, lr, steps)
    wanted = None if filters is None else _whole_filters(filters)
    asked = images.image_size(found.size if size is None else size)
    if features is None:
        features = make_features(found, goal.layers, device=device, precision=precision)
    check_layers(goal, features)
    where = next(iter(features.weights.values())).device if features.weights else torch.device(device or "cpu")
    numbers = _filters(wanted, goal, features)
    parameterisation = (
        image if isinstance(image, Image) else IMAGES[image](asked, channels=found.channels, device=where)
    )
    decoded = parameterisation.decode(parameterisation.init(key(seed, device=where)))
    channels, h, w = decoded.shape
    if channels != found.channels:
        raise ValueError(f"the image has {channels} channels; {found.name} takes {found.channels}")
    view = views
    if isinstance(view, str):
        view = views_by_name(view, image=(h, w), size=found.size, deterministic=deterministic)
    shown = view.apply(decoded, view.draw(key(seed, device=where))).shape
    if shown != (found.channels, *found.size):
        raise ValueError(f"the views must be {(found.channels, *found.size)} as {found.name} takes, got {tuple(shown)}")
    transform = transforms.chain(view, transforms.normalize(found.mean, found.std, device=where))
    plain = make_step(features, parameterisation, transform, goal, rule)
    pixels = len(numbers) * steps * h * w
    step = compiled_for(plain, compile, device=where, pixels=pixels, exported=features.exported, name=found.name)
    layer = features.paths[goal.layers[0]]

    def begin(chosen: Sequence[int]) -> tuple[State, Target]:
        keys = filter_keys(seed, layer, chosen, device=where)
        state = init_state(features, parameterisation, goal, rule, keys)
        return state, torch.tensor(list(chosen), dtype=torch.int64, device=where)

    bar = tqdm(
        total=steps * len(numbers),
        desc=goal.layers[0],
        unit="step",
        leave=False,
        disable=None if progress is None else not progress,
    )
    with bar, repeatable(deterministic):
        slots = batch_size if isinstance(batch_size, int) else CPU_SLOTS
        if batch_size == "auto" and where.type == "cuda" and not deterministic:
            slots = slots_for_memory(plain, features.weights, begin, numbers, device=where)
        outcome = run_all(
            step,
            features.weights,
            begin,
            numbers,
            steps=steps,
            slots=slots,
            tolerance=tolerance,
            progress=bar.update,
        )
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
        "precision": str(dtype).removeprefix("torch."),
        "compile": compile,
        "deterministic": deterministic,
        "device": where.type,
    }
    return _result(outcome, numbers, config)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, of whatever integer type, as Python's own."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _whole_filters(filters: Iterable[int] | int) -> list[int]:
    """The filter numbers, of whatever kind, as a list."""
    try:
        # An array of no axes is a number, though it has the looks of an iterable.
        many = isinstance(filters, Iterable) and getattr(filters, "ndim", 1) != 0
        numbers = [operator.index(f) for f in (filters if many else [filters])]  # pyright: ignore
    except TypeError as error:
        raise ValueError(f"filters must be whole numbers, got {filters!r}") from error
    if not numbers:
        raise ValueError("no filters were asked for: the list is empty")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"filter {next(f for f in numbers if numbers.count(f) > 1)} is asked for more than once")
    return numbers


def _filters(numbers: list[int] | None, goal: Objective, features: Features) -> list[int]:
    """The filter numbers, checked against the layers in which they pick a channel; ``None`` means all."""
    widths = {n: features.shapes[n][objectives.feature_axis(features.shapes[n])] for n in goal.targeted}
    if numbers is None:
        return list(range(min(widths.values()))) if widths else [0]
    for name, width in widths.items():
        outside = [f for f in numbers if not 0 <= f < width]
        if outside:
            raise ValueError(f"layer {name!r} has filters 0 to {width - 1}, got {outside[0]}")
    for number in (min(numbers), max(numbers)):
        if not 0 <= number < 2**32:
            raise ValueError(f"filter numbers must be in [0, 2**32), got {number}")
    return numbers


def _optimizer(optimizer: str | Optimizer, lr: float | None, steps: int) -> Optimizer:
    if isinstance(optimizer, Optimizer):
        if lr is not None:
            raise ValueError("lr= goes with an optimiser's name; give your own optimiser its learning rate yourself")
        return optimizer
    check_name("optimizer", optimizer, OPTIMIZERS)
    if optimizer == "default":
        return default_optimizer(steps, lr=lr)
    return published_optimizer(lr=0.05 if lr is None else lr)


def _result(outcome: Outcome, filters: Sequence[int], config: dict[str, Any]) -> Result:
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
        config=config,
    )
