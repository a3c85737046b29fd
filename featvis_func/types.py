"""The contracts: NamedTuples of pure functions, and of the state they pass on.

Axes, in einops notation:

    n  filters (the ``torch.func.vmap`` axis)     c h w  channels, rows, columns of one image
    v  views of one image in one step             t d    tokens, features of a transformer

Everything in the functional core is written for ONE image; only :mod:`featvis_func.engine.step` adds ``n``.
Tensors vary between calls; Python values are static, and a new one compiles anew.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Key: TypeAlias = Tensor
"""int64 ``(2,)``, each word in ``[0, 2**32)``: see :mod:`featvis_func.random`."""

Params: TypeAlias = Any
"""A pytree of float tensors: what the optimiser moves."""

OptState: TypeAlias = Any
"""A pytree of tensors: what an optimiser carries."""

Draw: TypeAlias = Any
"""A pytree of tensors: one sample of a random view."""

Target: TypeAlias = Any
"""A pytree of tensors that tells the filters of one run apart; for the built-in objectives the filter number,
int64 ``()``."""

Weights: TypeAlias = dict[str, Tensor]
"""The frozen tensors of a backbone, by name."""

Activations: TypeAlias = Mapping[str, Tensor]
"""Layer name -> that layer's output for one image: ``(c, h, w)``, ``(t, d)`` or ``(d,)``."""


class Image(NamedTuple):
    """A parameterisation: which tensors stand for an image, and the image that they stand for."""

    init: Callable[[Key], Params]
    """key -> parameters."""
    decode: Callable[[Params], Tensor]
    """parameters -> ``(c, h, w)`` float, inside the valid range whatever the parameters."""
    share_params: Callable[[Params], Params] | None = None
    """Where filters have a part in common: parameters, or updates, with the leading axis ``n`` -> the same, with that
    part averaged over ``n``. Such filters are rendered together."""
    encode: Callable[[Tensor], Params] | None = None
    """image ``(c, h, w)`` in ``[0, 1]`` -> parameters that decode to it; ``None``: there is no such way."""


class Transform(NamedTuple):
    """A random view of an image. The randomness is in ``draw``; ``apply`` is deterministic."""

    draw: Callable[[Key], Draw]
    """key -> a sample."""
    apply: Callable[[Tensor, Draw], Tensor]
    """(image ``(c, h, w)``, sample) -> view ``(c, h', w')``, or several views ``(v, c, h', w')``."""


class Optimizer(NamedTuple):
    """A gradient transformation that ASCENDS. ``update`` returns (what to add to the parameters, state)."""

    init: Callable[[Params, Key], OptState]
    """(parameters, key) -> state; the key serves optimisers that draw noise."""
    update: Callable[[Params, OptState, Params], tuple[Params, OptState]]
    """(gradients, state, parameters) -> (updates, state)."""


class Best(NamedTuple):
    """The best that each filter has shown so far, over the steps whose score and gradient were finite."""

    score: Tensor
    """``(n,)``, ``-inf`` before the first finite step."""
    image: Tensor
    """``(n, c, h, w)``: decoded, without the view."""
    activation: Tensor
    """``(n, h', w')``, ``(n, t)`` or ``(n,)``: the objective's activation map at that step."""
    step: Tensor
    """int64 ``(n,)``, ``-1`` before the first finite step."""


class State(NamedTuple):
    """What the next step needs. Every leaf has the leading axis ``n``."""

    params: Params
    opt: OptState
    key: Key
    """int64 ``(n, 2)``: constant over the run; a step folds its number in."""
    step: Tensor
    """int64 ``(n,)``: the number of the step to come."""
    best: Best
    saliency: Any = ()
    """``(n, h, w)``, or nothing if not wanted: how much the score's gradient was at each pixel, over all steps."""


class Info(NamedTuple):
    """What one step reports, each ``(n,)``; :func:`featvis_func.run` stacks them to ``(steps, n)``."""

    score: Tensor
    """The objective under this step's view, before the update."""
    grad_norm: Tensor
    """The norm of the parameters' raw gradient."""
    alive: Tensor
    """bool: some gradient was not zero, and none was redirected."""
    finite: Tensor
    """bool: the score and the gradient were finite; where not, the filter stood still."""
