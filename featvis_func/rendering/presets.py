"""The views and the optimisers that go by name."""

import functools
import math
from collections.abc import Callable

from featvis_func import transform as transforms
from featvis_func.optimizer import (
    adam,
    adamw,
    add_drift,
    add_noise,
    chain,
    clip_norm,
    linear_decay,
    nadam,
    normalize_gradient,
    sgd,
)
from featvis_func.transform import box_crop, jitter, normal_noise, pad, rotate, scale, uniform_noise, warp
from featvis_func.types import Optimizer, Transform
from featvis_func.validation import check_name

VIEWS = ("default", "published", "lucid", "maco", "none")
"""The names that :func:`views` knows."""

_RULES: dict[str, tuple[Callable[[float], Optimizer], float]] = {
    # Lucid's and Lucent's learning rate.
    "adam": (adam, 0.05),
    "adamw": (adamw, 0.05),
    "nadam": (nadam, 0.05),
    # The drift alone has no size of its own: what sleeps takes whole steps along it.
    "sgd": (lambda lr: chain(normalize_gradient(), sgd(lr, momentum=0.9)), 0.1),
}
OPTIMIZERS = ("default", "published", *_RULES)
"""The optimisers that :func:`render` knows by name."""

REDIRECT = 16
"""The first steps in which gradients are redirected with the default optimiser: as many as Lucid has."""


def views(name: str, *, image: tuple[int, int], size: tuple[int, int], deterministic: bool = False) -> Transform:
    """A preset of random views, from image size to model input size.

    * ``"default"``: the published magnitudes, with the whole frame in sight.
    * ``"published"``: pad 16, shift 8/w, scale 0.95 to 1.05, rotate 5 degrees, shift 4/w, crop, resize 256, crop
      224: the outer eighth is hardly seen and stays grey. One bilinear sampling where the script resamples six times.
    * ``"lucid"``: pad 12, jitter 8, scale 0.9 to 1.1, rotate 10 degrees (zero more often), jitter 4.
    * ``"maco"``: a random box of about a quarter of the sides, normal noise of 0.04 and uniform noise of 0.02 on
      values in ``[0, 1]``. MACO takes 32 such views a step, as :func:`~featvis_func.transform.multiview` makes them,
      of an image larger than the model's input.
    * ``"none"``: the image, resized.

    Args:
        name: one of :data:`VIEWS`.
        image: ``(h, w)`` of the images in pixels.
        size: ``(h', w')`` of the model's input in pixels.
        deterministic: see :func:`~featvis_func.transform.warp`.

    Raises:
        ValueError: an unknown name.

    Source: of ``"lucid"``, ``optvis/transform.py`` of tensorflow/lucid; of ``"maco"``, arXiv 2306.06805 and
    ``xplique/features_visualizations/maco.py``, whose noise of 0.08 is for values in ``[-1, 1]``: see
    :func:`~featvis_func.transform.box_crop`.

    >>> import torch
    >>> view = views("lucid", image=(128, 128), size=(224, 224))
    >>> view.apply(torch.rand(3, 128, 128), view.draw(torch.tensor([0, 1]))).shape
    torch.Size([3, 224, 224])
    """
    check_name("views", name, VIEWS)
    w = image[1]
    show = functools.partial(warp, size=size, deterministic=deterministic)
    if name == "default":
        # The published shifts are in 224ths of the width.
        return show(jitter(8 / 224 * w), scale(0.95, 1.05), rotate(5), jitter(4 / 224 * w))
    if name == "published":
        padded = w + 32  # the script's shifts are fractions 8/w and 4/w of the padded side, here of a square
        shown = scale(256 / 224, 256 / 224)
        return show(jitter(8 / w * padded), scale(0.95, 1.05), rotate(5), jitter(4 / w * padded), shown)
    if name == "lucid":
        # Lucid's jitter(d) crops d pixels at a random offset: a shift of up to d / 2.
        sizes = [1 + (i - 5) / 50 for i in range(11)]
        angles = [*range(-10, 11), 0, 0, 0, 0, 0]
        return show(pad(12), pad(-4), jitter(4), scale(choices=sizes), rotate(choices=angles), pad(-2), jitter(2))
    if name == "maco":
        return transforms.chain(show(box_crop()), normal_noise(0.04), uniform_noise(0.02))
    return show()


def default_optimizer(steps: int = 32, *, lr: float | None = None, drift: float = 1e-6) -> Optimizer:
    """Few steps to the picture: unit gradient, and Adam without momentum whose learning rate falls along a line.

    The way that the spectrum can travel is the same for any number of steps; more steps go it with more care, to more
    activation at less saturation. Momentum holds on to gradients of views that are gone: without it the published
    activation is reached in a sixth of the steps (``benchmarks/quality.py``).

    For filters that start without a gradient :func:`~featvis_func.render` redirects gradients beside it, in
    the first :data:`REDIRECT` steps. Of the 177 filters of SqueezeNet's ``features.12.expand3x3_activation`` that start
    dead on 128 pixels, in 32 steps that wakes all, to the robust activation of filters that never were dead (1600;
    those 1580); the drift wakes 113 (610, the others being grey), the script's noise 112 (710). Both together do as
    well as redirecting alone (177, 1580); the drift stays for what cannot be redirected: a whole layer that is off
    before the last convolution, and models that cannot be exported (``benchmarks/dead.py``).

    Args:
        steps: of the run, at least 1.
        lr: learning rate of the first step, above 0; the last one's is 0.3 times that. Default: ``8 / steps``.
        drift: moves filters that are left without a gradient, see :func:`~featvis_func.optimizer.add_drift`; 0 leaves
            it out.

    Raises:
        ValueError: fewer than 1 step, or a learning rate that is not above 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    start = 8.0 / steps if lr is None else lr
    if not 0 < start < math.inf:
        raise ValueError(f"the learning rate must be finite and above 0, got {lr}")
    rate = linear_decay(start, 0.3 * start, steps)
    wake = (add_drift(drift),) if drift else ()
    return chain(normalize_gradient(), *wake, adam(rate, betas=(0.0, 0.99)))


def published_optimizer(*, lr: float = 0.05, noise: float = 1e-6) -> Optimizer:
    """The published script's rule: unit gradient, noise that wakes dead filters, clip, Adam.

    Args:
        lr: learning rate, above 0.
        noise: standard deviation of the gradient noise; 0 leaves it out.

    Source: the constants are the published script's; the norm is each filter's own instead of the batch's.
    """
    wake = (add_noise(noise),) if noise else ()
    return chain(normalize_gradient(), *wake, clip_norm(0.1), adam(lr))


def plain_optimizer(name: str, *, lr: float | None = None, drift: float = 1e-6) -> Optimizer:
    """A rule of the textbooks behind the unit gradient: ``"adam"``, ``"adamw"``, ``"nadam"`` or ``"sgd"``.

    The gradient's size differs between layers, models and filters by orders of magnitude. Its norm divided out, a
    learning rate of steepest ascent is the length of a step everywhere, Adam's ``eps`` is small beside every gradient
    that there is, and the drift that wakes dead filters is small beside those that live (for ``"sgd"`` the sum of both
    is divided by its norm once more). The learning rate is constant.

    Args:
        name: one of these.
        lr: learning rate, above 0. Default: 0.05, as in Lucid and Lucent; of ``"sgd"``, which has a momentum of 0.9,
            0.1: more saturates. It moves low frequencies most, and takes several times as many steps as the others.
        drift: wakes filters that start without a gradient, see :func:`~featvis_func.optimizer.add_drift`; 0 leaves it
            out.

    Raises:
        ValueError: another name, or a learning rate that is not above 0.

    >>> import torch
    >>> rule = plain_optimizer("adam", lr=0.1)
    >>> state = rule.init(torch.zeros(1), torch.tensor([0, 1]))
    >>> round(rule.update(torch.full((1,), 1e-6), state, torch.zeros(1))[0].item(), 3)
    0.1
    """
    check_name("optimizer", name, _RULES)
    rule, usual = _RULES[name]
    wake = (add_drift(drift),) if drift else ()
    return chain(normalize_gradient(), *wake, rule(usual if lr is None else lr))
