"""One step of gradient ascent over a batch of filters, composed from functions for one image.

:func:`make_ascent` returns the two functions of the algorithm, ``init`` and ``step``;
:func:`~featvis_func.engine.run.run` repeats the step.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from featvis_func.backbone.features import Features, device_of
from featvis_func.backbone.hardware import compile_graph
from featvis_func.engine.forward import Forward, make_forward
from featvis_func.engine.run import Step
from featvis_func.objective import IMAGE, PICTURE, Objective
from featvis_func.optimizer import global_norm
from featvis_func.random import fold_in, key
from featvis_func.tree import tree_map
from featvis_func.types import (
    Best,
    Draw,
    Image,
    Info,
    Optimizer,
    OptState,
    Params,
    State,
    Target,
    Transform,
    Weights,
)

# The streams of a filter's key.
_INIT, _OPTIMIZER, _TRANSFORM = 0, 1, 2


class Ascent(NamedTuple):
    """Gradient ascent on an objective. Make one with :func:`make_ascent`."""

    init: Callable[[Tensor], State]
    """Keys, int64 ``(n, 2)``, see :func:`filter_keys` -> the state before the first step, on the keys' device."""
    step: Step
    """(weights, state, target) -> (state, info). ``target`` tells the filters of a batch apart: for the built-in
    objectives the filter numbers, int64 ``(n,)``."""
    finish: Callable[[Weights, State, Target], State] | None
    """(weights, state, target) -> the state with what is to be shown in ``best``, under one more random transform; to
    be called after the last step. ``None`` if that is the step of the highest score, which is there already."""
    decode: Callable[[State], Tensor]
    """The state -> the images to show if the run ended now, ``(n, c, h, w)``."""
    draw: Callable[[Tensor, Tensor], Draw]
    """(keys ``(n, 2)``, numbers of steps ``(n,)``) -> the random numbers of the transforms of these steps, each
    ``(n, ...)``."""
    step_with: Callable[[Weights, State, Target, Draw], tuple[State, Info]]
    """``step`` with its random numbers given: ``step`` itself takes ``draw(state.key, state.step)``."""


def make_ascent(
    features: Features,
    image: Image,
    transform: Transform,
    objective: Objective,
    optimizer: Optimizer,
    *,
    redirect: int = 0,
    smooth_pools: bool = False,
    saliency: bool = False,
) -> Ascent:
    """Compose gradient ascent over a batch of independent filters.

    Parameterisation, transform and objective are mapped over the filters by ``vmap``; the backbone runs once on the
    whole batch. The gradient of the sum of scores is each filter's own, because a backbone in evaluation mode treats
    images independently. A filter whose score or gradient is not finite keeps its parameters; the others go on.

    Args:
        features: the truncated backbone; its layers include those of the objective, under the same names.
        image: the parameterisation.
        transform: the random transform from an image to the input of the backbone, normalisation included:
            ``(c, h, w)``, or ``(v, c, h, w)`` for several transformed copies per step, whose scores are averaged (the
            activation map is that of the first). Likewise ``(c, t, h, w)`` for videos and ``(c, t)`` for signals.
        objective: what to maximise.
        optimizer: turns gradients into updates.
        redirect: number of first steps of each filter in which gradients are redirected past activations that block
            them, see :mod:`featvis_func.backbone.redirected_relu`.
        smooth_pools: whether strided max pools pass gradients to all positive values of a window, see
            :mod:`featvis_func.backbone.smoothed_pools`.
        saliency: whether the state accumulates the magnitude of the score's gradient at each pixel.

    Returns:
        An :class:`Ascent`. Its functions are pure functions of pytrees: they run eagerly, under
        ``torch.compile(fullgraph=True, dynamic=False)`` and inside compiled functions of yours. Another batch or image
        size compiles again, since ``vmap`` does not support symbolic sizes.

    Raises:
        ValueError: the features lack a layer of the objective, or cannot redirect or smooth gradients.
    """
    forward = make_forward(features, transform, objective, redirect=redirect, smooth_pools=smooth_pools)
    draw = partial(_draw, transform)
    with torch.no_grad():  # copies the constants of both to the device, see featvis_func.constants
        start = key(0, device=device_of(features))
        transform.apply(image.decode(image.init(start)), transform.draw(start))

    def init(keys: Tensor) -> State:
        # Both streams in one call of the generator, which is many small operations.
        streams = torch.arange(2, device=keys.device)
        own = vmap(lambda k: vmap(lambda stream: fold_in(k, 0, stream=stream))(streams))(keys)
        params = vmap(image.init)(own[:, _INIT])
        opt = vmap(optimizer.init)(params, own[:, _OPTIMIZER])
        decoded = vmap(image.decode)(params)
        count = keys.shape[0]
        best = Best(
            score=decoded.new_full((count,), -torch.inf),
            image=decoded if optimizer.shown is None else torch.full_like(decoded, torch.nan),
            activation=_zero_maps(features, objective, decoded),
            step=torch.full_like(keys[:, 0], -1),
        )
        accumulated = decoded.new_zeros((count, *decoded.shape[2:])) if saliency else ()
        state = State(params, opt, keys, torch.zeros_like(keys[:, 0]), best, accumulated)
        # The strides of every later state: with others, a compiled step would be compiled a second time.
        return tree_map(torch.Tensor.contiguous, state)

    def total_score(params: Params, probes: Any, *given: Any) -> tuple[Tensor, Any]:
        pixel_probe, redirect_mask = probes
        decoded = vmap(image.decode)(params)
        if saliency:
            decoded = decoded + pixel_probe
        scores, maps = forward(decoded, redirect_mask, *given)
        return scores.sum(), (scores, decoded, maps)

    def guarded_update(grads: Params, opt: OptState, params: Params, finite: Tensor) -> tuple[Params, OptState]:
        updates, new = optimizer.update(grads, opt, params)
        # A tensor that the optimiser only reads, such as a drift, is passed on without a copy.
        return updates, tree_map(lambda n, o: o if n is o else torch.where(finite, n, o), new, opt)

    def step(weights: Weights, state: State, target: Target) -> tuple[State, Info]:
        return step_with(weights, state, target, draw(state.key, state.step))

    def step_with(weights: Weights, state: State, target: Target, draws: Draw) -> tuple[State, Info]:
        # Two inputs whose value changes nothing, for the sake of their gradients: the first is the score's gradient at
        # each pixel, the second tells whose gradient was redirected.
        probes = (
            torch.zeros_like(state.best.image) if saliency else (),
            (state.step < redirect).to(state.best.score.dtype),
        )
        (grads, (pixel_grads, redirected)), (scores, decoded, maps) = grad(total_score, argnums=(0, 1), has_aux=True)(
            state.params, probes, weights, draws, target
        )
        norms = vmap(global_norm)(grads)
        finite = scores.isfinite() & norms.isfinite()
        if image.share_params is not None:
            finite = finite.all().expand_as(finite)
        updates, opt = vmap(guarded_update)(grads, state.opt, state.params, finite)
        if image.share_params is not None:
            updates = image.share_params(updates)
        moved = tree_map(torch.add, state.params, updates)
        better = finite & (scores > state.best.score)
        current = Best(scores, decoded, maps, state.step)
        if optimizer.shown is not None:  # what `finish` replaces is left alone
            current = current._replace(image=state.best.image, activation=state.best.activation)
        best = Best(*(o if n is o else select_rows(better, n, o) for n, o in zip(current, state.best, strict=True)))
        new = State(
            tree_map(lambda n, o: select_rows(finite, n, o), moved, state.params),
            opt,
            state.key,
            state.step + 1,
            best,
            state.saliency + select_rows(finite, pixel_grads.abs().mean(1), 0.0) if saliency else (),
        )
        return new, Info(scores, norms, (norms > 0) & (redirected == 0), finite)

    def decode(state: State) -> Tensor:
        params = state.params if optimizer.shown is None else vmap(optimizer.shown)(state.opt, state.params)
        return vmap(image.decode)(params)

    def finish(weights: Weights, state: State, target: Target) -> State:
        with torch.no_grad():
            decoded = decode(state)
        scores, maps = _evaluate(forward, weights, decoded, draw(state.key, state.step), target)
        # What never had a finite step is the image of the start, without a score.
        known = scores.isfinite() & (state.best.step >= 0)
        best = Best(
            score=select_rows(known, scores, -torch.inf),
            image=decoded,
            activation=select_rows(known, maps, 0.0),
            step=select_rows(known, state.step, -1),
        )
        return state._replace(best=best)

    return Ascent(init, step, None if optimizer.shown is None else finish, decode, draw, step_with)


def activation_maps(
    features: Features,
    transform: Transform,
    objective: Objective,
    weights: Weights,
    images: Tensor,
    keys: Tensor,
    steps: Tensor,
    target: Target,
) -> Tensor:
    """The objective's activation maps of given images, under the random transforms of given steps.

    Args:
        features, transform, objective: as for :func:`make_ascent`.
        weights: of the features.
        images: decoded, ``(n, c, h, w)``.
        keys: of the filters, int64 ``(n, 2)``.
        steps: numbers of steps, int64 ``(n,)``; the maps of those below 0 are zero.
        target: as for a step.

    Returns:
        ``(n, h', w')``, or what the objective's maps are.
    """
    forward = make_forward(features, transform, objective)
    _, maps = _evaluate(forward, weights, images, _draw(transform, keys, steps.clamp_min(0)), target)
    return select_rows(steps >= 0, maps, 0.0)


def _evaluate(forward: Forward, weights: Weights, images: Tensor, draws: Draw, target: Target) -> tuple[Tensor, Tensor]:
    """Scores and activation maps of given images, under given random transforms."""
    with torch.no_grad():
        return forward(images, images.new_zeros(len(images)), weights, draws, target)


def _draw(transform: Transform, keys: Tensor, steps: Tensor) -> Draw:
    """The random numbers of some filters' steps."""
    return vmap(lambda key, step: transform.draw(fold_in(key, step, stream=_TRANSFORM)))(keys, steps)


def _zero_maps(features: Features, objective: Objective, images: Tensor) -> Tensor:
    """Activation maps of zeros, in the shape that the objective's have."""
    blank = {name: images.new_zeros(shape) for name, shape in features.shapes.items()}
    blank |= {PICTURE + name: values for name, values in blank.items()}
    blank[IMAGE] = images[0]
    target = torch.zeros((), dtype=torch.int64, device=images.device)
    objective.score(blank, target)  # copies the constants that it holds to the device, see featvis_func.constants
    activation = objective.activation_map(blank, target)
    return activation.expand(len(images), *activation.shape).clone()


def filter_keys(seed: int, layer: str, filters: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """The keys of filters: each depends only on the seed, the layer's name and the filter's number.

    Args:
        seed: in ``[0, 2**64)``.
        layer: the layer's full name.
        filters: filter numbers.
        device: where the keys are, and with them everything that is drawn.

    Returns:
        int64 ``(n, 2)``.

    >>> filter_keys(0, "conv", [3, 5]).shape
    torch.Size([2, 2])
    """
    # On the CPU: for so few numbers a device would take as many launches as for an image.
    layer_key = fold_in(key(seed), zlib.crc32(layer.encode()))
    return vmap(fold_in, (None, 0))(layer_key, torch.tensor(list(filters), dtype=torch.int64)).to(device)


def compile_step(step: Step, **options: Any) -> Step:
    """``torch.compile(step, fullgraph=True, dynamic=False)``, with the Inductor settings of the device that it runs on.

    Args:
        step: of an :class:`Ascent`.
        options: further options of Inductor, as for ``torch.compile(options=...)``.

    Returns:
        The compiled step: the first call with new shapes compiles, later ones do not.

    Raises:
        TypeError: the step is not a function.
    """
    # torch keeps compiled code, and a limit to it, per code object. With a copy each step has a limit of its own, so
    # that one process can compile the steps of any number of layers.
    if not isinstance(step, FunctionType):
        raise TypeError(
            "compile_step takes the step of make_ascent, a function; for a renderer with a compiled step use"
            " make_renderer(compile=True)"
        )
    copy = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=False, backend=partial(compile_graph, settings=options))


def select_rows(condition: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """``new`` in the rows where the condition ``(n,)`` holds, else ``old``."""
    return torch.where(condition.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
