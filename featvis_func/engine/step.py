"""Composition: the only ``vmap`` and the only ``torch.compile``.

:func:`make_step` turns five pure parts into one pure step over a batch of filters; :func:`run` repeats it.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.func import grad, vmap

from featvis_func.backbone.features import Features
from featvis_func.cpu.inductor import compile_graph
from featvis_func.engine.forward import make_scoring
from featvis_func.objective import IMAGE, PICTURE, Objective
from featvis_func.optimizer import global_norm
from featvis_func.random import fold_in, key
from featvis_func.tree import tree_map
from featvis_func.types import Best, Image, Info, Key, Optimizer, OptState, Params, State, Target, Transform, Weights

Step: TypeAlias = Callable[[Weights, State, Target], tuple[State, Info]]
"""(weights, state, target) -> (state, info): pure, over a batch of filters."""

# The streams of a filter's key.
_INIT, _OPTIMIZER, _VIEW = 0, 1, 2


def make_step(
    features: Features,
    image: Image,
    transform: Transform,
    objective: Objective,
    optimizer: Optimizer,
    *,
    redirect: int = 0,
    saliency: bool = False,
) -> Step:
    """Composes one step of ascent over a batch of independent filters.

    Decode, view and objective run under ``vmap``; the backbone runs once on the whole batch. The gradient of the sum of
    scores is each filter's own, because an evaluation-mode backbone treats images independently.

    Args:
        features: the truncated backbone; its layers include those of the objective, by the same names.
        image: the parameterisation.
        transform: the random view, from the image to what the backbone takes, normalisation included: ``(c, h, w)``, or
            ``(v, c, h, w)`` for several views a step, over which the score is averaged (the map is the first's).
        objective: what to raise.
        optimizer: how to climb.
        redirect: in how many first steps of each filter gradients are redirected past activations that let none
            through, see :mod:`featvis_func.backbone.redirected_relu`.
        saliency: whether to add up what the score's gradient was at each pixel; the state must have been made so.

    Returns:
        A pure function of pytrees ``(weights, state, target) -> (state, info)``. It runs eagerly, under
        ``torch.compile(fullgraph=True, dynamic=False)`` and inside a compiled function of yours: other sizes compile
        again, for ``vmap`` does not work on symbolic ones. ``target``: for the built-in objectives the filter numbers,
        int64 ``(n,)``.

    Gradient: a filter whose score or gradient is not finite stands still; the others go on.

    Raises:
        ValueError: the features lack a layer of the objective, or cannot redirect gradients.
    """
    scoring = make_scoring(features, transform, objective, redirect=redirect)

    def ascent(params: Params, probes: Any, *given: Any) -> tuple[Tensor, Any]:
        nudge, redirect_mask = probes
        decoded = vmap(image.decode)(params)
        if saliency:
            decoded = decoded + nudge
        scores, maps = scoring(decoded, redirect_mask, *given)
        return scores.sum(), (scores, decoded, maps)

    def view_of(key: Key, step: Tensor) -> Any:
        return transform.draw(fold_in(key, step, stream=_VIEW))

    def guarded_update(grads: Params, opt: OptState, params: Params, finite: Tensor) -> tuple[Params, OptState]:
        updates, new = optimizer.update(grads, opt, params)
        # What a rule only reads, such as a drift, is handed on as it is.
        return updates, tree_map(lambda n, o: o if n is o else torch.where(finite, n, o), new, opt)

    def step(weights: Weights, state: State, target: Target) -> tuple[State, Info]:
        draws = vmap(view_of)(state.key, state.step)
        # Of what is no parameter, the gradient tells: where the pixels mattered, and whose gradient was redirected.
        probes = (
            torch.zeros_like(state.best.image) if saliency else (),
            (state.step < redirect).to(state.best.score.dtype),
        )
        (grads, (pixels, redirected)), (scores, decoded, maps) = grad(ascent, argnums=(0, 1), has_aux=True)(
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
        reached = (scores, decoded, maps, state.step)
        best = Best(*(select_rows(better, n, o) for n, o in zip(reached, state.best, strict=True)))
        new = State(
            tree_map(lambda n, o: select_rows(finite, n, o), moved, state.params),
            opt,
            state.key,
            state.step + 1,
            best,
            state.saliency + select_rows(finite, pixels.abs().mean(1), 0.0) if saliency else (),
        )
        return new, Info(scores, norms, (norms > 0) & (redirected == 0), finite)

    return step


def init_state(
    features: Features,
    image: Image,
    objective: Objective,
    optimizer: Optimizer,
    keys: Tensor,
    *,
    saliency: bool = False,
) -> State:
    """The state before the first step.

    Args:
        features, image, objective, optimizer, saliency: as in :func:`make_step`.
        keys: int64 ``(n, 2)``, one key per filter: see :func:`filter_keys`.

    Returns:
        A :class:`State` on the keys' device.
    """
    params = vmap(lambda k: image.init(fold_in(k, 0, stream=_INIT)))(keys)
    opt = vmap(lambda p, k: optimizer.init(p, fold_in(k, 0, stream=_OPTIMIZER)))(params, keys)
    decoded = vmap(image.decode)(params)
    blank = {name: decoded.new_zeros(shape) for name, shape in features.shapes.items()}
    blank |= {PICTURE + name: values for name, values in blank.items()}
    blank[IMAGE] = decoded[0]
    activation = objective.activation_map(blank, torch.zeros_like(keys[0, 0]))
    count = keys.shape[0]
    best = Best(
        score=decoded.new_full((count,), -torch.inf),
        image=decoded,
        activation=activation.expand(count, *activation.shape).clone(),
        step=torch.full_like(keys[:, 0], -1),
    )
    pixels = decoded.new_zeros((count, *decoded.shape[2:])) if saliency else ()
    state = State(params, opt, keys, torch.zeros_like(keys[:, 0]), best, pixels)
    # The strides are those of every later state, or a compiled step would be compiled twice.
    return tree_map(torch.Tensor.contiguous, state)


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


def compile_step(step: Step, *, cudagraphs: bool = False, **options: Any) -> Step:
    """``torch.compile(step, fullgraph=True, dynamic=False)``, with settings under which keyed randomness compiles soon.

    Args:
        step: from :func:`make_step`.
        cudagraphs: on CUDA, replay the step as a CUDA graph, in one launch; what it returns is copied out of the
            graph's own memory.
        options: further options of Inductor, as for ``torch.compile(options=...)``.

    Returns:
        The compiled step: the first call with new shapes compiles, later ones do not.
    """
    # torch keeps what it compiled, and a limit to it, by code object; a copy makes each step one of its own, so that
    # a process can compile the steps of any number of layers.
    plain = cast(FunctionType, step)
    own = FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    # On the CPU Inductor would inline up to a hundred of the generator's operations into each other, and take minutes.
    settings = {"realize_opcount_threshold": 10, **({"triton.cudagraphs": True} if cudagraphs else {}), **options}
    compiled = torch.compile(own, fullgraph=True, dynamic=False, backend=partial(compile_graph, settings=settings))
    if not cudagraphs:
        return compiled
    return lambda weights, state, target: tree_map(torch.clone, compiled(weights, state, target))


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


def select_rows(condition: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """Per filter: ``new`` where the condition ``(n,)`` holds, else ``old``."""
    return torch.where(condition.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
