"""Transforms of videos and signals: those of images applied to every frame, and shifts and stretches in time."""

import math

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.random import uniform
from featvis_func.transform.sampling import downsample
from featvis_func.types import Draw, Key, Transform
from featvis_func.validation import check_float, check_int


def per_frame(transform: Transform) -> Transform:
    """Apply a transform of images to every frame of a video, with one draw: ``(c, t, h, w)`` -> ``(c, t, h', w')``.

    All frames are shifted, scaled and rotated alike, seen over the same background, and so on. Noise is the same in all
    frames, too; without ``per_frame``, :func:`normal_noise` and :func:`uniform_noise` draw it for every value of a
    video, as for every value of anything.

    Args:
        transform: of one image ``(c, h, w)``; with :func:`multiview`, the result is ``(v, c, t, h', w')``.

    Returns:
        A :class:`Transform` of ``(..., c, t, h, w)`` with the draw of ``transform``.

    Raises:
        ValueError: when applied, if there are fewer than 4 axes.

    >>> from featvis_func.transform import jitter, warp
    >>> shifted = per_frame(warp(jitter(8), size=(32, 32)))
    >>> shifted.apply(torch.rand(3, 16, 64, 64), shifted.draw(torch.tensor([0, 1]))).shape
    torch.Size([3, 16, 32, 32])
    """

    def apply(video: Tensor, draw: Draw) -> Tensor:
        if video.ndim < 4:
            raise ValueError(f"per_frame expected a video (c, t, h, w), got {tuple(video.shape)}")
        return vmap(transform.apply, (-3, None), -3)(video, draw)

    return Transform(transform.draw, apply)


def warp_time(*, size: int, shift: float = 0.0, scale: tuple[float, float] = (1.0, 1.0), axis: int = -1) -> Transform:
    """Shift and stretch in time at random, and resample once, linearly, to the length that the model takes.

    Output sample ``i`` shows the time ``(i + 0.5 - size / 2) * n / (size * factor) + n / 2 + offset`` of ``n`` samples,
    where sample ``j`` is at ``j + 0.5``. Beyond the ends, the first and the last sample (of a video: frame) are
    repeated. If there are more than 1.5 times as many samples as the output has, they are averaged first. Without
    ``shift`` and ``scale``, and for the same length, the result is the input exactly.

    Args:
        size: length of the output: samples, or frames of a video.
        shift: largest offset in samples of the input, at least 0; offsets are uniform in ``[-shift, shift)``.
        scale: bounds of the uniformly distributed factor, above 0: 2 shows the central half at half the speed.
        axis: of time, counted from the last: -1 for signals ``(c, t)``, -3 for videos ``(c, t, h, w)``.

    Returns:
        A :class:`Transform` whose draw is offset and factor, float32 ``(2,)``.

    Raises:
        ValueError: if the size is below 1, the shift negative, a factor not above 0 or the bounds reversed, or the axis
            not counted from the last.

    Gradient: flows to the input, not to offset and factor.

    >>> later = warp_time(size=4, shift=1.0)
    >>> later.apply(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([0.5, 1.0]))
    tensor([[0.5000, 1.5000, 2.5000, 3.0000]])
    """
    size = check_int("warp_time: size", size, 1)
    shift = check_float("warp_time: shift", shift, 0)
    low, high = scale
    if not 0 < low <= high < math.inf:
        raise ValueError(f"warp_time: scale must be bounds with 0 < low <= high, got {scale}")
    if check_int("warp_time: axis", axis) >= 0:
        raise ValueError(f"warp_time: axis must be counted from the last, such as -1 for signals, got {axis}")

    def draw(key: Key) -> Draw:
        u = uniform(key, (2,))
        return torch.stack([(2.0 * u[0] - 1.0) * shift, u[1] * (high - low) + low])

    def apply(values: Tensor, drawn: Draw) -> Tensor:
        count = values.shape[axis]
        values = downsample(values, axis, count / size)
        # Offsets are in samples of the input, of which there may have been more.
        offset, factor = drawn.detach().to(values.dtype).unbind()
        kept = values.shape[axis]
        centred = torch.arange(size, device=values.device, dtype=values.dtype) + (0.5 - size / 2)
        time = centred * (kept / size) / factor + offset * (kept / count) + (kept / 2 - 0.5)
        time = time.clamp(0, kept - 1)
        before = time.floor()
        weight = (time - before).reshape(-1, *(1,) * (-1 - axis))
        first = before.long()
        second = (first + 1).clamp_max(kept - 1)
        # Indexing has a deterministic backward pass, under deterministic algorithms. Not `lerp`: its result is exact at
        # only one end.
        samples = values.movedim(axis, 0)
        return samples[first].movedim(0, axis) * (1.0 - weight) + samples[second].movedim(0, axis) * weight

    return Transform(draw, apply)
