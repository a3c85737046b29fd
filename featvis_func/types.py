"""The interfaces between the parts of the library: NamedTuples of pure functions, and of the state that they pass on.

Axes, in einops notation:

    n  filters (the ``torch.func.vmap`` axis)     c h w    channels, rows, columns of one image
    v  transformed copies of one image per step   c t h w  the same of a video of t frames
    t d  tokens, features of a transformer        c t      channels, samples of a signal

Wherever ``(c, h, w)`` is said of images, a video ``(c, t, h, w)`` or a signal ``(c, t)`` may take its place, unless
stated otherwise.

A parameterisation, transform, objective or optimizer is written for ONE image; :func:`featvis_func.make_ascent` maps
them over ``n`` filters. Two functions receive all filters at once, because they couple them: ``Image.share_params`` and
``Objective.batch_score``. Tensors may change from call to call; Python values are static, and another value compiles
anew.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Key: TypeAlias = Tensor
"""int64 ``(2,)``, each word in ``[0, 2**32)``: see :mod:`featvis_func.random`."""

Params: TypeAlias = Any
"""A pytree of float tensors: the parameters of an image, which the optimizer changes."""

OptState: TypeAlias = Any
"""A pytree of tensors: the state of an optimizer."""

Draw: TypeAlias = Any
"""A pytree of tensors: the random numbers of one application of a transform."""

Target: TypeAlias = Any
"""A pytree of tensors that tells the filters of one run apart; for the built-in objectives the filter number,
int64 ``()``."""

Weights: TypeAlias = dict[str, Tensor]
"""The frozen tensors of a backbone, by name."""

Activations: TypeAlias = Mapping[str, Tensor]
"""Layer name -> that layer's output for one image: ``(c, h, w)``, ``(c, t, h, w)``, ``(t, d)`` or ``(d,)``. Maps of
1-D convolutions are ``(t, d)``: with two axes the features are the last."""


class Image(NamedTuple):
    """A parameterisation: maps parameters to an image."""

    init: Callable[[Key], Params]
    """key -> parameters."""
    decode: Callable[[Params], Tensor]
    """parameters -> ``(c, h, w)`` float, in the valid range for any parameters."""
    share_params: Callable[[Params], Params] | None = None
    """Average the part of the parameters that all filters share: parameters, or updates, with the leading axis ``n`` ->
    the same, with that part averaged over ``n``. Such filters are rendered in one batch."""
    encode: Callable[[Tensor], Params] | None = None
    """image ``(c, h, w)`` in ``[0, 1]`` -> parameters that decode to it; ``None`` if there is no such function."""
    groups: Params | None = None
    """Parameters that an optimizer should treat alike, such as an octave of frequencies: int64 labels from 0, in the
    structure of the parameters, with axes of length 1 where they do not differ; see
    :func:`~featvis_func.optimizer.normalize_groups`. ``None`` if there are none."""


class Transform(NamedTuple):
    """A random transform of an image. The randomness is in ``draw``; ``apply`` is deterministic."""

    draw: Callable[[Key], Draw]
    """key -> random numbers."""
    apply: Callable[[Tensor, Draw], Tensor]
    """(image ``(c, h, w)``, random numbers) -> transformed image ``(c, h', w')``, or several transformed copies
    ``(v, c, h', w')``."""


class Optimizer(NamedTuple):
    """A gradient transformation for gradient ASCENT: ``update`` returns what is added to the parameters."""

    init: Callable[[Params, Key], OptState]
    """(parameters, key) -> state; the key is for optimizers that draw noise."""
    update: Callable[[Params, OptState, Params], tuple[Params, OptState]]
    """(gradients, state, parameters) -> (updates, state)."""
    shown: Callable[[OptState, Params], Params] | None = None
    """(state, parameters) -> the parameters of the image to show, such as an average over the run. ``None``: those of
    the step of the highest score."""


class Best(NamedTuple):
    """The step of the highest score so far, per filter, among the steps with a finite score and gradient."""

    score: Tensor
    """``(n,)``, ``-inf`` before the first finite step."""
    image: Tensor
    """``(n, c, h, w)``: decoded, before the random transform. Where the optimizer says which image to show, NaN until
    ``finish`` of the :class:`~featvis_func.Ascent` is called."""
    activation: Tensor
    """``(n, h', w')``, ``(n, t', h', w')``, ``(n, t)`` or ``(n,)``: the objective's activation map at that step."""
    step: Tensor
    """int64 ``(n,)``, ``-1`` before the first finite step. Where the optimizer says which image to show, the number of
    steps, after the last one."""


class State(NamedTuple):
    """The state of a run between two steps. Every leaf has the leading axis ``n``."""

    params: Params
    opt: OptState
    key: Key
    """int64 ``(n, 2)``: constant over the run; each step folds its own number in."""
    step: Tensor
    """int64 ``(n,)``: number of the next step."""
    best: Best
    saliency: Any = ()
    """``(n, h, w)``, or ``(n, t, h, w)`` or ``(n, t)``: sum over all steps of the magnitude of the score's gradient at
    each pixel; empty if not requested."""


class Info(NamedTuple):
    """The report of one step, each ``(n,)``; :func:`featvis_func.run` stacks them to ``(steps, n)``."""

    score: Tensor
    """The objective under this step's random transform, before the update."""
    grad_norm: Tensor
    """The norm of the gradient with respect to the parameters, before the optimizer."""
    alive: Tensor
    """bool: whether the gradient was nonzero without being redirected."""
    finite: Tensor
    """bool: whether the score and the gradient were finite; otherwise the parameters were not changed."""
