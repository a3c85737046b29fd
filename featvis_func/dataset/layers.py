"""Search of a layer: an image's score is the maximum of each channel over all positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from featvis_func.dataset.best import Top, keep_best
from featvis_func.objective import feature_axis
from featvis_func.types import Activations


@dataclass(frozen=True)
class LayerSearch:
    """The search for the best images of each channel of a layer."""

    layer: str
    """Name of the layer among the activations."""
    shape: tuple[int, ...]
    """Shape of its output for one image."""
    on_map: bool = True
    """Whether a place is a position of the layer."""

    @property
    def members(self) -> int:
        """Number of channels."""
        return self.shape[feature_axis(self.shape)]

    @property
    def sides(self) -> tuple[int, ...]:
        """Number of positions along each axis."""
        axis = feature_axis(self.shape)
        return self.shape[:axis] + self.shape[axis + 1 :]

    def update(self, top: Top, activations: Activations, numbers: Tensor) -> Top:
        """Merge a batch into the best so far.

        Args:
            top: the best so far.
            activations: layer -> ``(b, ...)``, of which the first ``n`` count.
            numbers: int64 ``(n,)``: see :func:`~featvis_func.dataset.best.keep_best`.
        """
        scores, places = _max_over_positions(activations[self.layer][: len(numbers)], top)
        return keep_best(top, scores, places, numbers)


def _max_over_positions(values: Tensor, top: Top) -> tuple[Tensor, Tensor]:
    """Return each filter's maximum over all positions, and its flat index, both ``(n, F)``.

    Args:
        values: activations ``(n, c, h, w)``, ``(n, c, t, h, w)``, ``(n, t, d)`` or ``(n, d)``.
        top: the best so far.

    Returns:
        The maxima, float32, ``-inf`` where an activation is NaN; and the index of the first position that attains the
        maximum, int64, 0 where the maximum is not among the best.
    """
    n, features = len(values), values.shape[-1]
    flat = values.flatten(2) if values.ndim >= 4 else values.reshape(n, -1, features).transpose(1, 2)
    scores = flat.amax(2).float()
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    improves = scores > top.scores[:, -1]
    # argmax takes several times as long as amax, and is needed for few images.
    places = torch.zeros_like(scores, dtype=torch.int64).masked_scatter(improves, flat[improves].argmax(1))
    return scores, places
