"""What the name of a layer says: which module, which part of its output, and what its axes mean.

A name is a module's full name or its unique end; behind it ``[0]`` or ``[key]`` choose from an output of several
tensors, and ``@hwc`` states the axes where they cannot be told: ``"encoder.attention[0]"``, ``"features.3@hwc"``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from featvis_func.validation import check_name, suggest

AXES = ("chw", "hwc", "td", "dt", "d")
"""What the axes of one image's activations can be: channels, height, width; tokens, features. The library computes in
``chw``, ``td`` and ``d``."""

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
    """Where activations are taken from."""

    module: str
    """Full name."""
    parts: str = ""
    """Of an output of several tensors: which, as in ``"[0]"``."""
    axes: str | None = None
    """One of :data:`AXES`, if stated."""

    @property
    def path(self) -> str:
        """The full name, by which results are kept."""
        return self.module + self.parts


def parse_layer(module: nn.Module, name: str) -> LayerRef:
    """Reads a layer's name.

    Raises:
        ValueError: as for :func:`resolve_layer`, or unknown axes.

    >>> parse_layer(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()), "0.0@hwc")
    LayerRef(module='0.0', parts='', axes='hwc')
    """
    match = _NAME.fullmatch(name)
    if match is None or not (match["parts"] or match["axes"]) or name in dict(module.named_modules()):
        return LayerRef(_resolved(module, name))
    if match["axes"] is not None:
        check_name("axes of a layer", match["axes"], AXES)
    return LayerRef(_resolved(module, match["module"]), match["parts"], match["axes"])


def resolve_layer(module: nn.Module, name: str) -> str:
    """The full name of a layer from a unique ending.

    Args:
        module: the model.
        name: a name from ``named_modules()``, or the end of exactly one. Whole components (``conv`` in ``a.conv``) go
            before parts of one (``4c.conv`` in ``inception4c.conv``). What may stand behind it is kept, but for axes.

    Returns:
        The full name.

    Raises:
        ValueError: no layer, or more than one, ends so; the message lists what exists.

    >>> resolve_layer(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()), "0.0")
    '0.0'
    """
    return parse_layer(module, name).path


def tensors_in(output: Any) -> dict[str, Tensor]:
    """The tensors of a module's output, by what stands behind the layer's name to choose them.

    >>> import torch
    >>> list(tensors_in((torch.zeros(1), {"a": torch.zeros(1)}, None)))
    ['[0]', '[1][a]']
    """
    return dict(_tensors(output, ""))


def axes_of(child: nn.Module, shape: Sequence[int], size: tuple[int, int], *, channels_last: bool) -> str | None:
    """What the axes of one image's activations mean: by the kind of module, then by the model, then by the form.

    Args:
        child: the module whose output it is.
        shape: of the output for one image, 1 to 3 axes.
        size: ``(h, w)`` of the model's input.
        channels_last: whether the model works with channels as the last of three axes anywhere.

    Returns:
        One of :data:`AXES`; ``None`` where it cannot be told.

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
    packed = [
        axes for axes, sides in (("chw", shape[1:]), ("hwc", shape[:2])) if _same_form((sides[0], sides[1]), size)
    ]
    return packed[0] if len(packed) == 1 else None


def check_axes(layer: str, axes: str, shape: Sequence[int]) -> None:
    """Raises ValueError if a layer's output for one image cannot have the axes that the user states.

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
    """Whether a module's output shows that the model keeps channels as the last of three axes."""
    return isinstance(output, Tensor) and output.ndim == 4 and _ends_in_channels(child, output.shape)


def canonical(values: Tensor, axes: str) -> Tensor:
    """Activations ``(n, ...)`` as the library computes with them: ``(n, c, h, w)``, ``(n, t, d)`` or ``(n, d)``.

    >>> import torch
    >>> canonical(torch.zeros(1, 7, 7, 96), "hwc").shape
    torch.Size([1, 96, 7, 7])
    """
    if axes == "hwc":
        return values.movedim(-1, -3)
    return values.transpose(-1, -2) if axes == "dt" else values


def feature_axis_of(axes: str) -> int:
    """Which of some axes is that of the channels, or features.

    >>> feature_axis_of("hwc"), feature_axis_of("td")
    (2, 1)
    """
    return axes.index("d" if "d" in axes else "c")


def _resolved(module: nn.Module, name: str) -> str:
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


def _tensors(output: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield where, output
        return
    if isinstance(output, Mapping):
        inner: Any = output.items()
    elif isinstance(output, tuple | list):
        inner = enumerate(output)
    else:
        return
    for key, value in inner:
        yield from _tensors(value, f"{where}[{key}]")


def _ends_in_channels(child: Any, shape: Sequence[int]) -> bool:
    if isinstance(child, nn.Linear):
        return shape[-1] == child.out_features
    # Not of a subclass, whose forward pass may permute, as torchvision's LayerNorm2d does.
    return type(child) in (nn.LayerNorm, nn.RMSNorm) and tuple(child.normalized_shape) == tuple(shape[-1:])


def _same_form(sides: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether sides are an image's, made smaller: by the same factor up to a pixel."""
    factor = (size[0] * size[1] / max(1, sides[0] * sides[1])) ** 0.5
    return all(abs(side - whole / factor) <= 1 for side, whole in zip(sides, size, strict=True)) and factor >= 0.9
