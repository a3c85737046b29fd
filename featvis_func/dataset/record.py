"""The photographs that excite each filter most, as a value: looked up, cut out, written and read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import safetensors
import safetensors.torch
from torch import Tensor

from featvis_func.dataset.key import FORMAT
from featvis_func.io.atomic import make_folder, whole_path, write_file
from featvis_func.io.image_files import open_picture
from featvis_func.validation import first_line, suggest

_ROUNDING = 1.0  # px, which a box may lie outside of its picture


class Example(NamedTuple):
    """One photograph that excites a filter, and what part of it does."""

    path: str
    score: float
    """The filter's largest activation in this photograph."""
    box: tuple[float, float, float, float]
    """Left, top, right and bottom of the receptive field at its position, in the photograph's pixels, upright."""
    position: tuple[int, ...]
    """Of that activation in the layer's output: row and column, the token's number, or nothing."""


class LayerExamples(NamedTuple):
    """A layer's ``F`` filters and their ``k`` photographs, the most exciting one first, on the CPU.

    Where there are fewer photographs, scores are ``-inf``, pictures and positions ``-1`` and boxes 0.
    """

    scores: Tensor
    """float32 ``(F, k)``: the largest activation over all positions."""
    pictures: Tensor
    """int64 ``(F, k)``: into :attr:`Examples.files`."""
    positions: Tensor
    """int64 ``(F, k, 2)``: row and column; ``(F, k, 1)``: token; ``(F, k, 0)`` of a vector."""
    boxes: Tensor
    """float32 ``(F, k, 4)``: as :attr:`Example.box`."""


@dataclass(frozen=True, eq=False)
class Examples:
    """What :func:`~featvis_func.top_examples` finds."""

    layers: Mapping[str, LayerExamples]
    """By full name, in the order asked for."""
    files: tuple[str, ...]
    """Whole paths of the photographs that are among any filter's."""
    seen: int
    """How many photographs there were."""
    skipped: int
    """How many files more, which could not be read."""
    key: Mapping[str, Any]
    """See :func:`~featvis_func.examples_key`."""

    def __repr__(self) -> str:
        filters = sum(len(layer.scores) for layer in self.layers.values())
        return f"Examples({filters} filters of {len(self.layers)} layers, {self.key['count']} of {self.seen} pictures)"

    def of(self, layer: str, filter: int) -> tuple[Example, ...]:
        """A filter's photographs, the most exciting one first.

        Args:
            layer: a full name, or the unique end of one among these layers; also with its axes, as it was asked for.
            filter: from 0.

        Raises:
            ValueError: no such layer or filter.
        """
        found = self.layers[self._resolved(layer)]
        if not 0 <= filter < len(found.scores):
            raise ValueError(f"layer {layer!r} has filters 0 to {len(found.scores) - 1}, not {filter}")
        scores, pictures, positions, boxes = (column[filter].tolist() for column in found)
        return tuple(
            Example(self.files[picture], score, tuple(box), tuple(position))
            for picture, score, box, position in zip(pictures, scores, boxes, positions, strict=True)
            if picture >= 0
        )

    def crop(self, example: Example, size: int = 112) -> PIL.Image.Image:
        """The part of the photograph that excites the filter, from its own pixels.

        Args:
            example: from :meth:`of`.
            size: pixels of the longer side.

        Raises:
            ValueError: the photograph cannot be read, or is smaller than it was; a size below 1.
        """
        return self.crops([example], size)[0]

    def crops(self, examples: Sequence[Example], size: int = 112) -> list[PIL.Image.Image]:
        """Many crops, in the order given: each photograph is read but once.

        Args, Raises: as for :meth:`crop`.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        wanted: dict[str, list[int]] = {}
        for number, example in enumerate(examples):
            wanted.setdefault(example.path, []).append(number)
        found: dict[int, PIL.Image.Image] = {}
        for path, numbers in wanted.items():
            whole = open_picture(path)
            found |= {number: _cut(whole, examples[number], size) for number in numbers}
        return [found[number] for number in range(len(examples))]

    def covers(self, key: Mapping[str, Any]) -> bool:
        """Whether these are what a search would find: the same but for layers, and all of its layers.

        Args:
            key: from :func:`~featvis_func.examples_key`.
        """
        return {**self.key, "layers": {}} == {**key, "layers": {}} and key["layers"].items() <= self.key[
            "layers"
        ].items()

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all; equal examples are equal bytes.

        Raises:
            ValueError: it cannot be written.
        """
        path = whole_path(path)
        tensors = {
            f"{name}/{kind}": tensor.contiguous()
            for name, layer in self.layers.items()
            for kind, tensor in layer._asdict().items()
        }
        about = {
            "layers": list(self.layers),
            "files": self.files,
            "seen": self.seen,
            "skipped": self.skipped,
            "key": dict(self.key),
        }
        data = safetensors.torch.save(tensors, {"examples": json.dumps(about, sort_keys=True)})
        try:
            make_folder(path.parent)
            write_file(path, data)
        except OSError as error:
            raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Examples":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: there is no such file, it is damaged or something else, or another version wrote it.
        """
        try:
            with safetensors.safe_open(Path(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["examples"])
                version = about["key"]["format"]
                layers = {
                    name: LayerExamples(*(file.get_tensor(f"{name}/{kind}") for kind in LayerExamples._fields))
                    for name in (about["layers"] if version == FORMAT else ())
                }
        except Exception as error:  # a damaged file fails in any way there is
            raise ValueError(f"{str(path)!r} cannot be read as examples: {first_line(error)}") from error
        if version != FORMAT:
            raise ValueError(f"{str(path)!r} has format {version!r}; this version reads {FORMAT}")
        return cls(layers, tuple(about["files"]), about["seen"], about["skipped"], about["key"])

    def _resolved(self, layer: str) -> str:
        stated = layer.rpartition("@")[0]  # the axes were for the search
        layer = stated if stated and layer not in self.layers else layer
        if layer in self.layers:
            return layer
        matches = [name for name in self.layers if layer and name.endswith("." + layer)]
        if len(matches) != 1:
            hint = suggest(layer, list(self.layers)) or f"; there are {', '.join(self.layers)}"
            raise ValueError(f"no examples of layer {layer!r}{hint}")
        return matches[0]


def _cut(whole: PIL.Image.Image, example: Example, size: int) -> PIL.Image.Image:
    left, top, right, bottom = example.box
    if min(left, top) < -_ROUNDING or right > whole.width + _ROUNDING or bottom > whole.height + _ROUNDING:
        raise ValueError(
            f"{example.path} has {whole.width} x {whole.height} pixels, which do not hold {example.box}; it has changed"
        )
    box = (max(left, 0.0), max(top, 0.0), min(right, float(whole.width)), min(bottom, float(whole.height)))
    w, h = right - left, bottom - top
    shape = (max(1, round(size * w / max(w, h))), max(1, round(size * h / max(w, h))))
    return whole.resize(shape, PIL.Image.Resampling.BICUBIC, box=box)
