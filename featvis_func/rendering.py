"""Composition: the only ``vmap`` and the only ``torch.compile``.

:func:`make_step` turns five pure parts into one pure step over a batch of filters; :func:`run` repeats it;
:func:`render` is the one-call door.
"""

import math
import operator
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree
from tqdm import tqdm

from featvis_func import image as images
from featvis_func import objective as objectives
from featvis_func import optimizer as optimizers
from featvis_func import transform as transforms
from featvis_func.features import Features, make_features
from featvis_func.models import Model, load_model
from featvis_func.objective import Objective
from featvis_func.random import fold_in, key
from featvis_func.result import Result, join
from featvis_func.types import Best, Image, Info, Key, Optimizer, Params, State, Target, Transform, Weights

Step: TypeAlias = Callable[[Weights, State, Target], tuple[State, Info]]
"""(weights, state, target) -> (state, info): pure, over a batch of filters."""

IMAGES = ("fourier", "pixel")
"""The parameterisations that :func:`render` knows by name."""

OPTIMIZERS = ("default", "published")
"""The optimisers that :func:`render` knows by name."""

# The streams of a filter's key.
_INIT, _OPTIMIZER, _VIEW = 0, 1, 2


def default_optimizer(steps: int = 32, *, lr: float | None = None, drift: float = 1e-6) -> Optimizer:
    """Few steps to the picture: unit gradient, and Adam without momentum whose learning rate falls along a line.

    The way that the spectrum can travel is the same for any number of steps; more steps go it with more care, to more
    activation at less saturation. Momentum holds on to gradients of views that are gone: without it the published
    activation is reached in a sixth of the steps (``benchmarks/quality.py``).

    Args:
        steps: of the run, at least 1.
        lr: learning rate of the first step, above 0; the last one's is 0.3 times that. Default: ``8 / steps``.
        drift: wakes filters that start without a gradient, see :func:`~featvis_func.optimizer.add_drift`; 0 leaves it
            out.

    Raises:
        ValueError: fewer than 1 step, or a learning rate that is not above 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    start = 8.0 / steps if lr is None else lr
    if not 0 < start < math.inf:
        raise ValueError(f"the learning rate must be finite and above 0, got {lr}")
    rate = optimizers.linear_decay(start, 0.3 * start, steps)
    wake = (optimizers.add_drift(drift),) if drift else ()
    return optimizers.chain(optimizers.normalize_gradient(), *wake, optimizers.adam(rate, betas=(0.0, 0.99)))


def published_optimizer(*, lr: float = 0.05, noise: float = 1e-6) -> Optimizer:
    """The published script's rule: unit gradient, noise that wakes dead filters, clip, Adam.

    Args:
        lr: learning rate, above 0.
        noise: standard deviation of the gradient noise; 0 leaves it out.

    Source: the constants are the published script's; the norm is each filter's own instead of the batch's.
    """
    wake = (optimizers.add_noise(noise),) if noise else ()
    return optimizers.chain(optimizers.normalize_gradient(), *wake, optimizers.clip_norm(0.1), optimizers.adam(lr))


def make_step(
    features: Features, image: Image, transform: Transform, objective: Objective, optimizer: Optimizer
) -> Step:
    """Composes one step of ascent over a batch of independent filters.

    Decode, view and objective run under ``vmap``; the backbone runs once on the whole batch. The gradient of the sum of
    scores is each filter's own, because an evaluation-mode backbone treats images independently.

    Args:
        features: the truncated backbone; its layers include those of the objective, by the same names.
        image: the parameterisation.
        transform: the random view, from the image to what the backbone takes, normalisation included.
        objective: what to raise.
        optimizer: how to climb.

    Returns:
        A pure function of pytrees ``(weights, state, target) -> (state, info)``. It runs eagerly, under
        ``torch.compile(fullgraph=True)`` and inside a compiled function of yours. ``target``: for the built-in
        objectives the filter numbers, int64 ``(n,)``.

    Gradient: a filter whose score or gradient is not finite stands still; the others go on.

    Raises:
        ValueError: the features lack a layer of the objective.
    """
    _check_layers(objective, features)

    def ascent(params: Params, weights: Weights, draws: Any, target: Target) -> tuple[Tensor, Any]:
        decoded = vmap(image.decode)(params)
        activations = features.apply(weights, vmap(transform.apply)(decoded, draws))
        activations = {name: a.to(decoded.dtype) for name, a in activations.items()}
        scores = vmap(objective.score)(activations, target)
        maps = vmap(objective.activation_map)(activations, target)
        return scores.sum(), (scores, decoded, maps)

    def view_of(key: Key, step: Tensor) -> Any:
        return transform.draw(fold_in(key, step, stream=_VIEW))

    def step(weights: Weights, state: State, target: Target) -> tuple[State, Info]:
        draws = vmap(view_of)(state.key, state.step)
        grads, (scores, decoded, maps) = grad(ascent, has_aux=True)(state.params, weights, draws, target)
        norms = vmap(optimizers.global_norm)(grads)
        finite = scores.isfinite() & norms.isfinite()
        updates, opt = vmap(optimizer.update)(grads, state.opt, state.params)
        moved = pytree.tree_map(torch.add, state.params, updates)
        better = finite & (scores > state.best.score)
        best = Best(
            *(_where(better, n, o) for n, o in zip((scores, decoded, maps, state.step), state.best, strict=True))
        )
        new = State(
            pytree.tree_map(lambda n, o: _where(finite, n, o), moved, state.params),
            pytree.tree_map(lambda n, o: _where(finite, n, o), opt, state.opt),
            state.key,
            state.step + 1,
            best,
        )
        return new, Info(scores, norms, norms > 0, finite)

    return step


def init_state(features: Features, image: Image, objective: Objective, optimizer: Optimizer, keys: Tensor) -> State:
    """The state before the first step.

    Args:
        features, image, objective, optimizer: as in :func:`make_step`.
        keys: int64 ``(n, 2)``, one key per filter: see :func:`filter_keys`.

    Returns:
        A :class:`State` on the keys' device.
    """
    params = vmap(lambda k: image.init(fold_in(k, 0, stream=_INIT)))(keys)
    opt = vmap(lambda p, k: optimizer.init(p, fold_in(k, 0, stream=_OPTIMIZER)))(params, keys)
    decoded = vmap(image.decode)(params)
    blank = {name: decoded.new_zeros(shape) for name, shape in features.shapes.items()}
    activation = objective.activation_map(blank, torch.zeros_like(keys[0, 0]))
    count = keys.shape[0]
    best = Best(
        score=decoded.new_full((count,), -torch.inf),
        image=decoded,
        activation=activation.expand(count, *activation.shape).clone(),
        step=torch.full_like(keys[:, 0], -1),
    )
    state = State(params, opt, keys, torch.zeros_like(keys[:, 0]), best)
    # The strides are those of every later state, or a compiled step would be compiled twice.
    return pytree.tree_map(torch.Tensor.contiguous, state)


def filter_keys(seed: int, layer: str, filters: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """The keys of filters: each depends on the seed, the layer's name and the filter's number alone.

    Args:
        seed: in ``[0, 2**64)``.
        layer: the layer's full name.
        filters: filter numbers.
        device: where the keys live, and so where all is drawn.

    Returns:
        int64 ``(n, 2)``.

    >>> filter_keys(0, "conv", [3, 5]).shape
    torch.Size([2, 2])
    """
    of_layer = fold_in(key(seed, device=device), zlib.crc32(layer.encode()))
    return vmap(fold_in, (None, 0))(of_layer, torch.tensor(list(filters), dtype=torch.int64, device=device))


def compile_step(step: Step, **options: Any) -> Step:
    """``torch.compile(step, fullgraph=True)``, with settings under which the keyed randomness compiles soon.

    Args:
        step: from :func:`make_step`.
        options: further options of Inductor, as for ``torch.compile(options=...)``.

    Returns:
        The compiled step: the first call with new shapes compiles, later ones do not.
    """
    # On the CPU Inductor would inline up to a hundred of the generator's operations into each other, and take minutes.
    return torch.compile(step, fullgraph=True, options={"realize_opcount_threshold": 10, **options})


def run(
    step: Step,
    weights: Weights,
    state: State,
    target: Target,
    *,
    steps: int,
    callback: Callable[[Info], object] | None = None,
) -> tuple[State, Info]:
    """Repeats a step, without waiting for the device.

    Args:
        step: from :func:`make_step`, compiled or not.
        weights, state, target: its arguments.
        steps: how often, at least 1.
        callback: called with each step's :class:`Info`, its tensors still on the device.

    Returns:
        The last state, and an :class:`Info` of stacked reports, each ``(steps, n)``.

    Raises:
        ValueError: fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    infos = []
    for _ in range(steps):
        state, info = step(weights, state, target)
        infos.append(info)
        if callback is not None:
            callback(info)
    return state, Info(*(torch.stack(column) for column in zip(*infos, strict=True)))


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
    batch_size: int = 8,
    device: torch.device | str | None = None,
    features: Features | None = None,
    compile: bool = False,
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
        optimizer: ``"default"`` (:func:`default_optimizer`), ``"published"`` (:func:`published_optimizer`), or an
            :class:`Optimizer`.
        batch_size: filters rendered at once; the last batch is padded, so that all have one shape.
        device: where to compute, such as ``"cuda"``. Default: where the model is.
        features: the model's, from :func:`~featvis_func.features.make_features`, so that a second call on a layer
            need not trace the model again. They hold the weights as they were.
        compile: whether to pass the step through ``torch.compile(fullgraph=True)``.
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
    if not isinstance(views, str | Transform):
        raise ValueError(f"views must be one of {', '.join(transforms.VIEWS)} or a Transform, got {views!r}")
    steps, batch_size = _whole("steps", steps, 1), _whole("batch_size", batch_size, 1)
    seed = _whole("seed", seed)
    key(seed)
    lr = None if lr is None else float(lr)
    asked = images.image_size(found.size if size is None else size)
    if features is None:
        features = make_features(found, goal.layers, device=device)
    _check_layers(goal, features)
    where = next(iter(features.weights.values())).device if features.weights else torch.device(device or "cpu")
    numbers = _filters(filters, goal, features)
    parameterisation = _image(image, asked, found.channels, where)
    decoded = parameterisation.decode(parameterisation.init(key(seed, device=where)))
    channels, h, w = decoded.shape
    if channels != found.channels:
        raise ValueError(f"the image has {channels} channels; {found.name} takes {found.channels}")
    view = transforms.views(views, image=(h, w), size=found.size) if isinstance(views, str) else views
    shown = view.apply(decoded, view.draw(key(seed, device=where))).shape
    if shown != (found.channels, *found.size):
        raise ValueError(f"the views must be {(found.channels, *found.size)} as {found.name} takes, got {tuple(shown)}")
    transform = transforms.chain(view, transforms.normalize(found.mean, found.std, device=where))
    rule = _optimizer(optimizer, lr, steps)
    step = make_step(features, parameterisation, transform, goal, rule)
    if compile:
        if not features.exported:
            raise ValueError(f"{found.name} cannot be exported, and so not compiled; use compile=False")
        step = compile_step(step)

    layer = features.paths[goal.layers[0]]
    width = min(batch_size, len(numbers))
    bar = tqdm(
        total=steps * -(-len(numbers) // width),
        desc=goal.layers[0],
        unit="step",
        leave=False,
        disable=None if progress is None else not progress,
    )
    parts = []
    with bar:
        for start in range(0, len(numbers), width):
            chunk = numbers[start : start + width]
            padded = chunk + chunk[-1:] * (width - len(chunk))
            keys = filter_keys(seed, layer, padded, device=where)
            state = init_state(features, parameterisation, goal, rule, keys)
            target = torch.tensor(padded, dtype=torch.int64, device=where)
            state, info = run(step, features.weights, state, target, steps=steps, callback=lambda _: bar.update())
            parts.append(_result(state.best, info, chunk))
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
        "compile": compile,
        "device": where.type,
    }
    return join(parts, config)


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Per filter: ``new`` where the condition ``(n,)`` holds, else ``old``."""
    return torch.where(condition.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, of whatever integer type, as Python's own."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _check_layers(objective: Objective, features: Features) -> None:
    missing = [name for name in objective.layers if name not in features.shapes]
    if missing:
        raise ValueError(f"the features lack layer {missing[0]!r} of the objective; they have {list(features.shapes)}")


def _filters(filters: Iterable[int] | int | None, goal: Objective, features: Features) -> list[int]:
    """The filter numbers, checked against the layers in which they pick a channel."""
    widths = {n: features.shapes[n][objectives.feature_axis(features.shapes[n])] for n in goal.targeted}
    if filters is None:
        numbers = list(range(min(widths.values()))) if widths else [0]
    else:
        try:
            # An array of no axes is a number, though it has the looks of an iterable.
            many = isinstance(filters, Iterable) and getattr(filters, "ndim", 1) != 0
            numbers = [operator.index(f) for f in (filters if many else [filters])]  # pyright: ignore
        except TypeError as error:
            raise ValueError(f"filters must be whole numbers, got {filters!r}") from error
    if not numbers:
        raise ValueError("no filters were asked for: the list is empty")
    for name, width in widths.items():
        outside = [f for f in numbers if not 0 <= f < width]
        if outside:
            raise ValueError(f"layer {name!r} has filters 0 to {width - 1}, got {outside[0]}")
    for number in (min(numbers), max(numbers)):
        if not 0 <= number < 2**32:
            raise ValueError(f"filter numbers must be in [0, 2**32), got {number}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"filter {next(f for f in numbers if numbers.count(f) > 1)} is asked for more than once")
    return numbers


def _optimizer(optimizer: str | Optimizer, lr: float | None, steps: int) -> Optimizer:
    if isinstance(optimizer, Optimizer):
        if lr is not None:
            raise ValueError("lr= goes with an optimiser's name; give your own optimiser its learning rate yourself")
        return optimizer
    if optimizer == "default":
        return default_optimizer(steps, lr=lr)
    if optimizer == "published":
        return published_optimizer(lr=0.05 if lr is None else lr)
    raise ValueError(f"unknown optimizer {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")


def _image(image: str | Image, size: tuple[int, int], channels: int, device: torch.device) -> Image:
    if isinstance(image, Image):
        return image
    if image not in IMAGES:
        raise ValueError(f"unknown image parameterisation {image!r}; expected one of {', '.join(IMAGES)}")
    factory = images.fourier if image == "fourier" else images.pixel
    return factory(size, channels=channels, device=device)


def _result(best: Best, info: Info, filters: Sequence[int]) -> Result:
    """What one batch found, without its padding, on the CPU."""
    count = len(filters)
    alive, finite = info.alive.any(0).tolist(), info.finite.all(0).tolist()
    status = tuple("nonfinite" if not f else "ok" if a else "dead" for a, f in zip(alive, finite, strict=True))
    return Result(
        images=best.image[:count].float().cpu(),
        activations=best.activation[:count].float().cpu(),
        scores=best.score[:count].float().cpu(),
        best_step=best.step[:count].cpu(),
        filters=tuple(filters),
        status=status[:count],
        history=info.score[:, :count].float().cpu(),
    )
