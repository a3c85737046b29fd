"""Measure receptive fields: which pixels of the input each position of a layer depends on.

In each of ``h + w`` images one row or one column of pixels is made so large that it dominates the others. Where this
changes a layer's output, the output depends on that row or column. One forward pass of these images measures all layers
exactly, whatever padding, strides, pools and branches they have.

Gradients, the usual method, show less: they are zero where a ReLU is off and at values that a maximum does not select,
and near the border of a field they vanish in rounding.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.backbone.features import Features
from featvis_func.backbone.hooks import wave

# The large value is this power of the largest finite number: it dominates all other pixels, and leaves room for the
# weights to increase it without overflow.
_EXPONENT = 0.4


class Field(NamedTuple):
    """The receptive fields of a layer's positions, in pixels of the model's input."""

    rows: Tensor
    """int64 ``(h', 2)``: for each row of the layer's map, the half-open range of the pixel rows that it depends on."""
    columns: Tensor
    """int64 ``(w', 2)``: likewise for its columns."""

    @property
    def size(self) -> tuple[int, int]:
        """``(h, w)`` of the largest field, which all positions far from the borders have."""
        h, w = ((ends[:, 1] - ends[:, 0]).max().item() for ends in (self.rows, self.columns))
        return int(h), int(w)

    def boxes(self, positions: Tensor) -> Tensor:
        """Return windows of the same size, :attr:`size`, for some positions.

        Where the border of the image cuts off a field, the window is shifted inside the image, so that all windows of a
        layer have the same scale.

        Args:
            positions: int64 ``(..., 2)``: row and column of the map.

        Returns:
            float32 ``(..., 4)``: left, top, right and bottom.
        """
        sides = []
        for axis, (ends, length) in enumerate(zip((self.rows, self.columns), self.size, strict=True)):
            first, end = ends[positions[..., axis]].float().unbind(-1)
            start = ((first + end - length) / 2).clamp_min(0).clamp_max(int(ends.max()) - length)
            sides.append((start, start + length))
        (top, bottom), (left, right) = sides
        return torch.stack([left, top, right, bottom], dim=-1)


def receptive_fields(
    features: Features, shape: tuple[int, int, int], *, batch_size: int = 32
) -> Mapping[str, Field | None]:
    """Measure the receptive fields of all layers of some features.

    Args:
        features: from :func:`~featvis_func.make_features`.
        shape: ``(c, h, w)`` of the model's input.
        batch_size: how many of the ``h + w`` images run at a time.

    Returns:
        Requested layer name -> its fields; ``None`` for tokens and vectors. Positions behind attention or a global pool
        (as in squeeze-and-excitation) have the whole image as their field, and so have positions that no pixel changes.

    Raises:
        ValueError: the input is not that of a model of images, such as a video or a signal.

    >>> from featvis_func import load_model, make_features
    >>> features = make_features(load_model("texturenet"), ["block1.conv"])
    >>> receptive_fields(features, (3, 96, 96))["block1.conv"].size
    (5, 5)
    """
    if len(shape) != 3:
        raise ValueError(
            f"receptive fields are measured for models of images (c, h, w), got an input of {tuple(shape)}"
        )
    maps = [name for name, shape_of_one in features.shapes.items() if len(shape_of_one) == 3]
    fields: dict[str, Field | None] = dict.fromkeys(features.shapes)
    if not maps:
        return fields
    rows, columns = (_dependence(features, maps, shape, axis, min(batch_size, shape[1 + axis])) for axis in (0, 1))
    return {**fields, **{name: Field(_ends(rows[name]), _ends(columns[name])) for name in maps}}


def _dependence(
    features: Features, maps: list[str], shape: tuple[int, int, int], axis: int, batch_size: int
) -> dict[str, Tensor]:
    """Return layer -> bool ``(h, h')``, whether the pixel row changes the layer's row; along axis 1, columns."""
    c, h, w = shape
    count = shape[1 + axis]
    weight = next((weight for weight in features.weights.values() if weight.is_floating_point()), torch.zeros(()))
    plain = wave(c * h * w).reshape(1, *shape).float().to(weight.device)
    large = plain * torch.finfo(weight.dtype).max ** _EXPONENT
    index = torch.arange(count, device=weight.device)
    changed: dict[str, list[Tensor]] = {name: [] for name in maps}
    # cuDNN may use algorithms, such as FFT, in which one position changes the rounding error of others.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        before = features.apply(features.weights, plain.expand(batch_size, -1, -1, -1))
        for start in range(0, count, batch_size):
            # All batches have the same size, and so the same rounding; indices from `count` on select no pixel.
            marked = index == torch.arange(start, start + batch_size, device=weight.device)[:, None]
            marked = marked[:, None, :, None] if axis == 0 else marked[:, None, None, :]
            after = features.apply(features.weights, torch.where(marked, large, plain))
            for name in maps:
                # In any channel, and at any position along the other axis of the map.
                changed[name].append((after[name] != before[name]).any(1).any(2 - axis).cpu())
    return {name: torch.cat(parts)[:count] for name, parts in changed.items()}


def _ends(changed: Tensor) -> Tensor:
    """Return the half-open range of pixel rows that change each row of a map: bool ``(h, h')`` -> int64 ``(h', 2)``."""
    count = len(changed)
    index = torch.arange(count)[:, None]
    first = torch.where(changed, index, count).amin(0)
    end = torch.where(changed, index + 1, 0).amax(0)
    unchanged = ~changed.any(0)
    return torch.stack([first.masked_fill(unchanged, 0), end.masked_fill(unchanged, count)], dim=1)
