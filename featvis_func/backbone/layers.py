"""Names of layers: which module, which of its tensors, and what the axes of that tensor mean.

A name is a module's full name or a unique ending of it, followed by what selects one of its tensors:

    encoder.attention[0], output[logits]   an item of an output of several tensors, by index, key or attribute
    relu#2                                 the output of the second call in a forward pass; default: of the last one
    layer3<                                the input; layer3<[1] and layer3<[mask] where there are several
    layer3.0/add                           an operation in the module's own forward pass; layer3.0/add#2 the second
    output                                 the model's own output, also written ""
    features.3@hwc                         states the axes where they cannot be inferred
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from featvis_func.models.copying import layer_modules
from featvis_func.validation import check_name, suggest

AXES = ("chw", "hwc", "td", "dt", "d", "cthw", "thwc")
"""Layouts of one image's activations: channels, time, height and width; tokens (or time) and features. The library
computes in ``cthw``, ``chw``, ``td`` and ``d``."""

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
_NAME = re.compile(
    r"(?P<module>.*?)(/(?P<operation>\w+))?(#(?P<call>[1-9]\d*))?(?P<input><)?(?P<parts>(\[[^\[\]]+\])*)(@(?P<axes>\w+))?"
)
OUTPUT = "output"
"""The name of the model's own output."""


class LayerRef(NamedTuple):
    """The module, and the tensor of it, that activations are taken from."""

    module: str
    """Full name; empty for the model itself."""
    parts: str = ""
    """Selects from several tensors, as in ``"[0]"``; empty for a single tensor."""
    axes: str | None = None
    """One of :data:`AXES`; ``None`` if the name does not state it."""
    call: int | None = None
    """Which call in a forward pass, from 1; ``None``: the last one."""
    input: bool = False
    """Whether it is the module's input instead of its output."""
    operation: str = ""
    """An operation in the module's own forward pass, such as ``"add"``, instead of the module."""

    @property
    def path(self) -> str:
        """The full name, under which results are stored."""
        model = "" if self.input else OUTPUT
        name = f"{self.module}/{self.operation}" if self.operation else self.module or model
        call = "" if self.call is None else f"#{self.call}"
        return f"{name}{call}{'<' if self.input else ''}{self.parts}"


def parse_layer(module: nn.Module, name: str) -> LayerRef:
    """Parse the name of a layer.

    Args:
        module: the model.
        name: as for :func:`resolve_layer`.

    Raises:
        ValueError: as for :func:`resolve_layer`, or unknown axes.

    >>> parse_layer(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()), "0.0#2@hwc")
    LayerRef(module='0.0', parts='', axes='hwc', call=2, input=False, operation='')
    """
    names = [known for known in layer_modules(module) if known]
    name = _without_wrappers(name, names)
    match = _NAME.fullmatch(name)
    if name in names or match is None or _is_ending(name, names):
        return LayerRef(_full_name(names, name))
    if match["axes"] is not None:
        check_name("axes of a layer", match["axes"], AXES)
    call = None if match["call"] is None else int(match["call"])
    ref = LayerRef("", match["parts"], match["axes"], call, match["input"] is not None, match["operation"] or "")
    if match["module"] in ("", OUTPUT) and match["module"] not in names:
        if OUTPUT in names and not ref.operation and not ref.input:
            raise ValueError(f"the model's own output has no name here, because a module is called {OUTPUT!r}")
        return ref
    return ref._replace(module=_full_name(names, match["module"]))


def resolve_layer(module: nn.Module, name: str) -> str:
    """Return the full name of a layer, given a unique ending of it.

    Args:
        module: the model.
        name: a name from ``named_modules()``, or the ending of exactly one, with optional suffixes, see
            :mod:`featvis_func.backbone.layers`. Endings of complete components (``conv`` in ``a.conv``) take precedence
            over others (``4c.conv`` in ``inception4c.conv``). The parts of names that ``torch.compile`` and
            ``DataParallel`` add may be left in or out.

    Returns:
        The full name, with the suffixes that select a tensor, without the axes.

    Raises:
        ValueError: no layer, or more than one, has this ending; the message lists what exists.

    >>> resolve_layer(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()), "0.0")
    '0.0'
    """
    return parse_layer(module, name).path


def tensors_in(output: Any) -> dict[str, Tensor]:
    """Return the tensors of a module's output, by the suffix of the layer's name that selects each.

    Items of mappings, tuples and lists, and the fields of dataclasses.

    >>> import torch
    >>> list(tensors_in((torch.zeros(1), {"a": torch.zeros(1)}, None)))
    ['[0]', '[1][a]']
    """
    return dict(_tensors(output, ""))


def select(output: Any, parts: str) -> Tensor | None:
    """Return the tensor that a suffix selects; ``None`` if there is none.

    Args:
        output: of a module.
        parts: such as ``"[0][key]"``. The items of a named tuple have a number and a name.

    >>> import torch
    >>> select({"a": (torch.zeros(1), torch.ones(1))}, "[a][1]")
    tensor([1.])
    """
    found = tensors_in(output).get(parts)
    if found is not None:
        return found
    for key in re.findall(r"\[([^\[\]]+)\]", parts):
        if isinstance(output, tuple | list) and key.isdecimal():
            output = output[int(key)] if int(key) < len(output) else None
        elif isinstance(output, Mapping):
            output = next((value for name, value in output.items() if str(name) == key), None)
        else:
            output = getattr(output, key, None) if key.isidentifier() else None
    return output if isinstance(output, Tensor) else None


def axes_of(child: nn.Module, shape: Sequence[int], size: tuple[int, ...], *, channels_last: bool) -> str | None:
    """Infer what the axes of one image's activations mean: from the type of module, the model, and the shape.

    Args:
        child: the module that returned the activations.
        shape: of the output for one image, 1 to 4 axes.
        size: of the model's input: ``(h, w)``, ``(t, h, w)`` or ``(t,)``.
        channels_last: whether any module of the model returns channels as the last axis of a map, see
            :func:`works_channels_last`.

    Returns:
        One of :data:`AXES`; ``None`` if the axes are ambiguous.

    >>> axes_of(nn.Identity(), (7, 7, 768), (224, 224), channels_last=True)
    'hwc'
    """
    if len(shape) == 1:
        return "d"
    first = isinstance(child, _CHANNELS_FIRST)
    if len(shape) == 2:
        # A signal model's maps have channels first, as images have; other models' are tokens.
        signal = len(size) == 1 and not channels_last
        return "dt" if first or (signal and not _ends_in_channels(child, shape)) else "td"
    channels_first_axes, channels_last_axes = ("chw", "hwc") if len(shape) == 3 else ("cthw", "thwc")
    if len(shape) == 4 and len(size) < 3 and not first:
        return None
    if first or not channels_last:
        return channels_first_axes
    if _ends_in_channels(child, shape):
        return channels_last_axes
    sides = {channels_first_axes: shape[-2:], channels_last_axes: shape[-3:-1]}
    fitting = [axes for axes, (h, w) in sides.items() if len(size) > 1 and _same_aspect((h, w), (size[-2], size[-1]))]
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


def works_channels_last(child: nn.Module, output: Any, positions: int) -> bool:
    """Whether a module returns maps whose channels are the last axis, as its type and the shape show.

    Args:
        child: the module.
        output: of the module, for several images.
        positions: number of axes of the model's input that are not channels: 2 for images, 3 for videos.
    """
    return isinstance(output, Tensor) and output.ndim == positions + 2 and _ends_in_channels(child, output.shape)


def canonical(values: Tensor, axes: str) -> Tensor:
    """Permute activations ``(n, ...)`` to ``(n, c, t, h, w)``, ``(n, c, h, w)``, ``(n, t, d)`` or ``(n, d)``.

    >>> import torch
    >>> canonical(torch.zeros(1, 7, 7, 96), "hwc").shape
    torch.Size([1, 96, 7, 7])
    """
    if axes in ("hwc", "thwc"):
        return values.movedim(-1, -len(axes))
    return values.transpose(-1, -2) if axes == "dt" else values


def feature_axis_of(axes: str) -> int:
    """Return the index of the axis of channels, or features.

    >>> feature_axis_of("hwc"), feature_axis_of("td")
    (2, 1)
    """
    return axes.index("d" if "d" in axes else "c")


def _without_wrappers(name: str, names: Sequence[str]) -> str:
    """A name that was copied from a compiled or parallel model, as it is without these wrappers."""
    if name in names:
        return name
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    plain = ".".join(parts)
    while parts and parts[0] == "module" and not _is_ending(".".join(parts), names):
        parts = parts[1:]
        plain = ".".join(parts)
    if plain in names or _is_ending(plain, names):
        return plain
    inner = ".".join(part for part in parts if part != "module")
    return inner if inner in names or _is_ending(inner, names) else plain


def _is_ending(name: str, names: Sequence[str]) -> bool:
    return bool(name) and any(known.endswith(name) for known in names)


def _full_name(names: Sequence[str], name: str) -> str:
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
    elif is_dataclass(output) and not isinstance(output, type):
        items = ((field.name, getattr(output, field.name, None)) for field in fields(output))
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
