"""The optimizers that go by name."""

from collections.abc import Callable

from featvis_func.optimizer import (
    adam,
    adamw,
    add_drift,
    add_noise,
    average_iterates,
    chain,
    clip_norm,
    linear_decay,
    nadam,
    normalize_gradient,
    normalize_groups,
    pull_to_start,
    sgd,
)
from featvis_func.types import Optimizer, Params
from featvis_func.validation import check_float, check_int, check_name

_RULES: dict[str, tuple[Callable[[float], Optimizer], float]] = {
    # The learning rate of Lucid and Lucent.
    "adam": (adam, 0.05),
    "adamw": (adamw, 0.05),
    "nadam": (nadam, 0.05),
    # The drift has no size of its own: without a gradient, whole steps follow it.
    "sgd": (lambda lr: chain(normalize_gradient(), sgd(lr, momentum=0.9)), 0.1),
}

REDIRECT = 16
"""Number of first steps in which gradients are redirected with the optimizers of :data:`REDIRECTING`; Lucid's."""

REDIRECTING = ("default", "activation")


def optimizer_for(optimizer: str | Optimizer, lr: float | None, steps: int, groups: Params | None = None) -> Optimizer:
    """A preset by its name, or the user's own optimizer.

    Args:
        optimizer, lr, steps: as for :func:`featvis_func.render`.
        groups: of the image, see :class:`featvis_func.Image`.

    Raises:
        ValueError: an unknown name, neither a name nor an optimizer, or a learning rate for the user's own optimizer.
    """
    if isinstance(optimizer, Optimizer):
        if lr is not None:
            raise ValueError(
                "lr= goes with the name of an optimizer; give your own optimizer its learning rate yourself"
            )
        return optimizer
    check_name("optimizer", optimizer, ("default", "activation", "published", *_RULES))
    if optimizer == "default":
        return default_optimizer(steps, lr=lr, groups=groups)
    if optimizer == "activation":
        return activation_optimizer(steps, lr=lr)
    if optimizer == "published":
        return published_optimizer(lr=0.05 if lr is None else lr)
    return plain_optimizer(optimizer, lr=lr)


def default_optimizer(
    steps: int = 48, *, lr: float | None = None, drift: float = 1e-6, groups: Params | None = None
) -> Optimizer:
    """The default optimizer: unit gradient, normalised by octaves, a pull back to the start, and an average.

    Every octave of the spectrum moves by the same root mean square, and within an octave the gradient keeps its shape.
    Adam instead moves each frequency by as much, also where the gradient is next to nothing, which fills the image with
    grain. The pull bounds the contrast: see :func:`~featvis_func.optimizer.pull_to_start`. The rate stays constant, so
    that large steps keep the image from fitting this network's details, and the image is the average of the run, mostly
    of its second half, which keeps of the steps what they agree on: see
    :func:`~featvis_func.optimizer.average_iterates`. All three make images that another network recognises more often
    (``benchmarks/transfer.py``). The pull is a fifth of the default rate: the contrast is bounded alike for any number
    of steps; more of them average over more random transforms. There is no momentum, which would keep gradients of
    earlier random transforms.

    Without groups (all parameterisations but spectra), it is :func:`activation_optimizer`.

    For filters that start without a gradient, :func:`featvis_func.render` also redirects gradients in the first
    :data:`REDIRECT` steps, and the drift serves where nothing can be redirected: a whole layer that is off before the
    last convolution, and models that cannot be exported (``benchmarks/dead.py``).

    Args:
        steps: number of steps of the run, at least 1.
        lr: learning rate, above 0: the root mean square of an octave's step. Default: ``10 / steps`` from 64 steps on;
            from 32 to 64 steps as for 64, since larger steps make images that another network recognises less often;
            below, where they would not get far, ``5 / steps``, at most 1.25.
        drift: size of the drift that moves filters without a gradient, see
            :func:`~featvis_func.optimizer.add_drift`; 0 for none.
        groups: octaves of the image's parameters, :attr:`featvis_func.Image.groups`.

    Raises:
        ValueError: fewer than 1 step, or a learning rate that is not above 0.
    """
    check_int("steps", steps, 1)
    if groups is None:
        return activation_optimizer(steps, lr=lr, drift=drift)
    revive = (add_drift(drift),) if drift else ()
    # As for 64 steps from 32 to 64 of them: see `lr`.
    pull = min(max(1.0 / steps, 2.0 / 64), 2.0 / steps, 0.25)
    rate = 5.0 * pull if lr is None else check_float("learning rate", lr, above=0)
    return chain(
        normalize_gradient(), *revive, normalize_groups(groups), sgd(rate), pull_to_start(pull), average_iterates()
    )


def activation_optimizer(steps: int = 32, *, lr: float | None = None, drift: float = 1e-6) -> Optimizer:
    """The optimizer that raises the activation soonest: unit gradient, and Adam without momentum.

    With ``transforms="small"`` the published activation is reached in a sixth of the steps (``benchmarks/quality.py``).
    The images show less of what the unit looks for than those of :func:`default_optimizer`
    (``benchmarks/transfer.py``). The learning rate decreases linearly: the distance that the parameters can travel is
    the same for any number of steps; more steps take smaller ones, to a higher activation at less saturation.

    Args:
        steps, drift: as for :func:`default_optimizer`.
        lr: learning rate of the first step, above 0; that of the last step is 0.3 times as large. Default:
            ``8 / steps``.

    Raises:
        ValueError: fewer than 1 step, or a learning rate that is not above 0.
    """
    check_int("steps", steps, 1)
    start = 8.0 / steps if lr is None else check_float("learning rate", lr, above=0)
    revive = (add_drift(drift),) if drift else ()
    rate = linear_decay(start, 0.3 * start, steps)
    return chain(normalize_gradient(), *revive, adam(rate, betas=(0.0, 0.99)))


def published_optimizer(*, lr: float = 0.05, noise: float = 1e-6) -> Optimizer:
    """The optimizer of the published script: unit gradient, noise that revives dead filters, clipping, Adam.

    Args:
        lr: learning rate, above 0.
        noise: standard deviation of the gradient noise; 0 for none.

    Source: the constants are the published script's; the norm is each filter's own instead of the batch's.
    """
    revive = (add_noise(noise),) if noise else ()
    return chain(normalize_gradient(), *revive, clip_norm(0.1), adam(lr))


def plain_optimizer(name: str, *, lr: float | None = None, drift: float = 1e-6) -> Optimizer:
    """A textbook optimizer on the unit gradient: ``"adam"``, ``"adamw"``, ``"nadam"`` or ``"sgd"``.

    The size of the gradient differs between layers, models and filters by orders of magnitude. With the gradient
    divided by its norm, a learning rate of steepest ascent is the length of a step everywhere, Adam's ``eps`` is small
    beside every gradient, and the drift that revives dead filters is small beside the gradient of others (for
    ``"sgd"`` the sum of both is divided by its norm again). The learning rate is constant.

    Args:
        name: one of these.
        lr: learning rate, above 0. Default: 0.05, as in Lucid and Lucent; for ``"sgd"``, which has a momentum of 0.9,
            0.1: more saturates. SGD moves low frequencies most, and takes several times as many steps as the others.
        drift: size of the drift that moves filters without a gradient, see
            :func:`~featvis_func.optimizer.add_drift`; 0 for none.

    Raises:
        ValueError: another name, or a learning rate that is not above 0.

    >>> import torch
    >>> rule = plain_optimizer("adam", lr=0.1)
    >>> state = rule.init(torch.zeros(1), torch.tensor([0, 1]))
    >>> round(rule.update(torch.full((1,), 1e-6), state, torch.zeros(1))[0].item(), 3)
    0.1
    """
    check_name("optimizer", name, _RULES)
    rule, default = _RULES[name]
    revive = (add_drift(drift),) if drift else ()
    return chain(normalize_gradient(), *revive, rule(default if lr is None else lr))
