"""Names of layers: which module, which part of its output, and what the axes of that output mean.

A name is a module's full name or a unique ending of it. A suffix ``[0]`` or ``[key]`` selects from an output of several
tensors, and ``@hwc`` states the axes where they cannot be inferred: ``"encoder.attention[0]"``, ``"features.3@hwc"``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from featvis_func.validation import check_name, suggest

AXES = ("chw", "hwc", "td", "dt", "d")
"""Layouts of one image's activations: channels, height and width; tokens and features. The library computes in ``chw``,
``td`` and ``d``."""

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.Upsample,
    nn.PixelShuffle,
)
_NAME = re.compile(r"(?P<module>.*?)(?P<parts>(\[[^\[\]]+\])*)(@(?P<axes>\w+))?")


class LayerRef(NamedTuple):
    """The module, and the part of its output, that activations are taken from."""

    module: str
    """Full name."""
    parts: str = ""
    """Selects from an output of several tensors, as in ``"[0]"``; empty for a single tensor."""
    axes: str | None = None
    """One of :data:`AXES`; ``None`` if the name does not state it."""

    @property
    def path(self) -> str:
        """The full name, under which results are stored."""
        return self.module + self.parts


def parse_layer(module: nn.Module, name: str) -> LayerRef:
    """Parse the name of a layer.

    Args:
        module: the model.
        name: as for :func:`resolve_layer`.

    Raises:
        ValueError: as for :func:`resolve_layer`, or unknown axes.

    >>> parse_layer(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()), "0.0@hwc")
    LayerRef(module='0.0', parts='', axes='hwc')
    """
    match = _NAME.fullmatch(name)
    if match is None or not (match["parts"] or match["axes"]) or name in dict(module.named_modules()):
        return LayerRef(_full_name(module, name))
    if match["axes"] is not None:
        check_name("axes of a layer", match["axes"], AXES)
    return LayerRef(_full_name(module, match["module"]), match["parts"], match["axes"])


def resolve_layer(module: nn.Module, name: str) -> str:
    """Return the full name of a layer, given a unique ending of it.

    Args:
        module: the model.
        name: a name from ``named_modules()``, or the ending of exactly one, with an optional suffix that selects a part
            or states the axes. Endings of complete components (``conv`` in ``a.conv``) take precedence over others
            (``4c.conv`` in ``inception4c.conv``).

    Returns:
        The full name, with the suffix that selects a part, without the axes.

    Raises:
        ValueError: no layer, or more than one, has this ending; the message lists what exists.

    >>> resolve_layer(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()), "0.0")
    '0.0'
    """
    return parse_layer(module, name).path


def tensors_in(output: Any) -> dict[str, Tensor]:
    """Return the tensors of a module's output, by the suffix of the layer's name that selects each.

    >>> import torch
    >>> list(tensors_in((torch.zeros(1), {"a": torch.zeros(1)}, None)))
    ['[0]', '[1][a]']
    """
    return dict(_tensors(output, ""))


def axes_of(child: nn.Module, shape: Sequence[int], size: tuple[int, int], *, channels_last: bool) -> str | None:
    """Infer what the axes of one image's activations mean: from the type of module, the model, and the shape.

    Args:
        child: the module that returned the activations.
        shape: of the output for one image, 1 to 3 axes.
        size: ``(h, w)`` of the model's input.
        channels_last: whether any module of the model returns channels as the last of three axes.

    Returns:
        One of :data:`AXES`; ``None`` if the axes are ambiguous.

    >>> axes_of(nn.Identity(), (7, 7, 768), (224, 224), channels_last=True)
    'hwc'
    """
    if len(shape) == 1:
        return "d"
    first = isinstance(child, _CHANNELS_FIRST)
    if len(shape) == 2:
        return "dt" if first else "td"
    if first or not channels_last:
        return "chw"
    if _ends_in_channels(child, shape):
        return "hwc"
    fitting = [
        axes for axes, sides in (("chw", shape[1:]), ("hwc", shape[:2])) if _same_aspect((sides[0], sides[1]), size)
    ]
    return fitting[0] if len(fitting) == 1 else None


def check_axes(layer: str, axes: str, shape: Sequence[int]) -> None:
    """Raise ValueError if a layer's output for one image does not have as many axes as stated.

    >>> check_axes("conv", "hwc", (7, 96))
    Traceback (most recent call last):
        ...
    ValueError: layer 'conv' gives (7, 96) per image, which is not h x w x c
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"layer {layer!r} gives {tuple(shape) or 'nothing'} per image, which is not {' x '.join(axes)}"
        )


def works_channels_last(child: nn.Module, output: Any) -> bool:
    """Whether a module returns channels as the last of three axes, as its type and the shape show."""
    return isinstance(output, Tensor) and output.ndim == 4 and _ends_in_channels(child, output.shape)


def canonical(values: Tensor, axes: str) -> Tensor:
    """Permute activations ``(n, ...)`` to ``(n, c, h, w)``, ``(n, t, d)`` or ``(n, d)``.

    >>> import torch
    >>> canonical(torch.zeros(1, 7, 7, 96), "hwc").shape
    torch.Size([1, 96, 7, 7])
    """
    if axes == "hwc":
        return values.movedim(-1, -3)
    return values.transpose(-1, -2) if axes == "dt" else values


def feature_axis_of(axes: str) -> int:
    """Return the index of the axis of channels, or features.

    >>> feature_axis_of("hwc"), feature_axis_of("td")
    (2, 1)
    """
    return axes.index("d" if "d" in axes else "c")


def _full_name(module: nn.Module, name: str) -> str:
    names = [n for n, _ in module.named_modules(remove_duplicate=False) if n]
    if name in names:
        return name
    for matches in (
        [n for n in names if name and n.endswith("." + name)],
        [n for n in names if name and n.endswith(name)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            shown = ", ".join(repr(n) for n in matches[:10]) + (", ..." if len(matches) > 10 else "")
            raise ValueError(f"layer {name!r} is ambiguous; it could be {shown}")
    hint = suggest(name, names) or f"; the layers are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    raise ValueError(f"no layer {name!r}{hint}")


def _tensors(output: Any, suffix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield suffix, output
        return
    if isinstance(output, Mapping):
        items: Any = output.items()
    elif isinstance(output, tuple | list):
        items = enumerate(output)
    else:
        return
    for key, value in items:
        yield from _tensors(value, f"{suffix}[{key}]")


def _ends_in_channels(child: Any, shape: Sequence[int]) -> bool:
    if isinstance(child, nn.Linear):
        return shape[-1] == child.out_features
    # Subclasses are excluded, because their forward pass may permute, as that of torchvision's LayerNorm2d does.
    return type(child) in (nn.LayerNorm, nn.RMSNorm) and tuple(child.normalized_shape) == tuple(shape[-1:])


def _same_aspect(sides: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether ``sides`` are those of an image reduced by one factor, up to a pixel."""
    factor = (size[0] * size[1] / max(1, sides[0] * sides[1])) ** 0.5
    return all(abs(side - full / factor) <= 1 for side, full in zip(sides, size, strict=True)) and factor >= 0.9
