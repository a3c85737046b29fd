"""Receptive fields: which part of the input each position of a layer depends on, measured.

In each of ``h + w`` images one row or one column of pixels is made so large that it drowns the others; where a layer's
output is another one then, it depends on that row or column. A forward pass of these images measures all layers,
exactly, with what padding, strides, pools and branches do.

Gradients, the usual way, show less: nothing passes where a rectifier is shut, or from what a maximum leaves out, and
what is far from the middle of a field is lost in rounding.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from featvis_func.backbone.features import Features
from featvis_func.backbone.hooks import wave

# The power of the largest number that there is which drowns the rest and leaves room for what weights make of it.
_LARGE = 0.4


class Field(NamedTuple):
    """The receptive fields of a layer's positions, in pixels of the model's input."""

    rows: Tensor
    """int64 ``(h', 2)``: of each row of the layer's map, the first pixel row that it depends on, and one behind the
    last."""
    columns: Tensor
    """int64 ``(w', 2)``: the same of its columns."""

    @property
    def size(self) -> tuple[int, int]:
        """``(h, w)`` of the largest field, which is that of all positions far from the borders."""
        h, w = ((ends[:, 1] - ends[:, 0]).max().item() for ends in (self.rows, self.columns))
        return int(h), int(w)

    def boxes(self, positions: Tensor) -> Tensor:
        """The windows about some positions, all of one size: a field cut off by a border is shifted inside.

        So all windows of a layer have one scale, and those at a border show what else is near it.

        Args:
            positions: int64 ``(..., 2)``: row and column of the map.

        Returns:
            float32 ``(..., 4)``: left, top, right and bottom.
        """
        sides = []
        for axis, (ends, length) in enumerate(zip((self.rows, self.columns), self.size, strict=True)):
            first, behind = ends[positions[..., axis]].float().unbind(-1)
            start = ((first + behind - length) / 2).clamp_min(0).clamp_max(int(ends.max()) - length)
            sides.append((start, start + length))
        (top, bottom), (left, right) = sides
        return torch.stack([left, top, right, bottom], dim=-1)


def receptive_fields(
    features: Features, shape: tuple[int, int, int], *, batch_size: int = 32
) -> Mapping[str, Field | None]:
    """Measures the receptive fields of all layers of some features.

    Args:
        features: from :func:`~featvis_func.make_features`.
        shape: ``(c, h, w)`` of the model's input.
        batch_size: images at a time, of ``h + w``.

    Returns:
        layer, by the name that the features have -> its fields; ``None`` for tokens and vectors, which may depend on
        the whole picture. So do positions behind attention, global pools and what is scaled by them
        (squeeze-and-excitation), and such that nothing spreads to.

    >>> from featvis_func import load_model, make_features
    >>> features = make_features(load_model("texturenet"), ["block1.conv"])
    >>> receptive_fields(features, (3, 96, 96))["block1.conv"].size
    (5, 5)
    """
    maps = [name for name, of_one in features.shapes.items() if len(of_one) == 3]
    fields: dict[str, Field | None] = dict.fromkeys(features.shapes)
    if not maps:
        return fields
    rows, columns = (_reached(features, maps, shape, axis, min(batch_size, shape[1 + axis])) for axis in (0, 1))
    return {**fields, **{name: Field(_ends(rows[name]), _ends(columns[name])) for name in maps}}


def _reached(
    features: Features, maps: list[str], shape: tuple[int, int, int], axis: int, batch_size: int
) -> dict[str, Tensor]:
    """Layer -> bool ``(pixel rows, its rows)``, or columns: whether the one reaches the other."""
    c, h, w = shape
    count = shape[1 + axis]
    weight = next((weight for weight in features.weights.values() if weight.is_floating_point()), torch.zeros(()))
    plain = wave(c * h * w).reshape(1, *shape).float().to(weight.device)
    large = plain * torch.finfo(weight.dtype).max ** _LARGE
    number = torch.arange(count, device=weight.device)
    found: dict[str, list[Tensor]] = {name: [] for name in maps}
    # cuDNN may convolve by way of transforms, in which the rounding of one position reaches others.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        before = features.apply(features.weights, plain.expand(batch_size, -1, -1, -1))
        for start in range(0, count, batch_size):
            # All batches have one width, and so the same rounding; numbers behind the last mark nothing.
            marked = number == torch.arange(start, start + batch_size, device=weight.device)[:, None]
            marked = marked[:, None, :, None] if axis == 0 else marked[:, None, None, :]
            after = features.apply(features.weights, torch.where(marked, large, plain))
            for name in maps:
                # In any channel, and anywhere along the map's other axis.
                found[name].append((after[name] != before[name]).any(1).any(2 - axis).cpu())
    return {name: torch.cat(parts)[:count] for name, parts in found.items()}


def _ends(reached: Tensor) -> Tensor:
    """First, and one behind the last, of the pixel rows ``(p,)`` that reach each row ``(r,)``: int64 ``(r, 2)``."""
    count = len(reached)
    number = torch.arange(count)[:, None]
    first = torch.where(reached, number, count).amin(0)
    behind = torch.where(reached, number + 1, 0).amax(0)
    nowhere = ~reached.any(0)
    return torch.stack([first.masked_fill(nowhere, 0), behind.masked_fill(nowhere, count)], dim=1)
