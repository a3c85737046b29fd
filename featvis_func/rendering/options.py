"""What a user writes for an option, as what the library computes with."""

from featvis_func import image as images
from featvis_func.rendering.presets import OPTIMIZERS, default_optimizer, plain_optimizer, published_optimizer
from featvis_func.types import Optimizer
from featvis_func.validation import check_name

IMAGES = {
    "fourier": images.fourier,
    "pixel": images.pixel,
    "phase": images.phase,
    "laplacian_pyramid": images.laplacian_pyramid,
    "cppn": images.cppn,
    "alpha": images.alpha,
}
"""The parameterisations known by name."""


def optimizer_for(optimizer: str | Optimizer, lr: float | None, steps: int) -> Optimizer:
    """A preset by its name, or the user's own."""
    if isinstance(optimizer, Optimizer):
        if lr is not None:
            raise ValueError("lr= goes with an optimiser's name; give your own optimiser its learning rate yourself")
        return optimizer
    check_name("optimizer", optimizer, OPTIMIZERS)
    if optimizer == "default":
        return default_optimizer(steps, lr=lr)
    if optimizer == "published":
        return published_optimizer(lr=0.05 if lr is None else lr)
    return plain_optimizer(optimizer, lr=lr)
