"""The result of a search for top examples: look up, crop, save and load."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import safetensors
import safetensors.torch
from torch import Tensor

from featvis_func.dataset.key import FORMAT
from featvis_func.io.atomic import absolute_path, make_folder, write_file
from featvis_func.io.filter_spec import ranges
from featvis_func.io.image_files import open_image
from featvis_func.validation import check_int, first_line, suggest

_BOX_TOLERANCE = 1.0  # px, by which rounding may place a box outside its image


class Example(NamedTuple):
    """An image that activates a filter, and the region responsible."""

    path: str
    score: float
    """The filter's maximum activation over all positions; of a member of a family the objective's own score."""
    box: tuple[float, float, float, float]
    """Receptive field at :attr:`position`: left, top, right and bottom, in pixels of the image file, upright."""
    position: tuple[int, ...]
    """Position of the maximum in the layer's output, or in the map of a family's objective: ``(row, column)``,
    ``(token,)``, or ``()`` for a vector."""


class LayerExamples(NamedTuple):
    """The ``k`` images with the highest scores for each of a layer's ``F`` filters, in descending order, on the CPU.

    Of a family, ``F`` counts the members that were searched. The images of one member, see
    :func:`~featvis_func.objective.facets`, share its examples.

    Missing entries, if there are fewer than ``k`` images, have score ``-inf``, picture and position ``-1`` and box 0.
    """

    scores: Tensor
    """float32 ``(F, k)``: see :attr:`Example.score`."""
    pictures: Tensor
    """int64 ``(F, k)``: indices into :attr:`Examples.files`."""
    positions: Tensor
    """int64 ``(F, k, 2)``: row and column; ``(F, k, 1)``: token; ``(F, k, 0)`` for a vector; in general one number for
    each axis of positions."""
    boxes: Tensor
    """float32 ``(F, k, 4)``: see :attr:`Example.box`."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The result of :func:`~featvis_func.top_examples`."""

    layers: Mapping[str, LayerExamples]
    """Results by full layer name or by a family's label, in the order given."""
    files: tuple[str, ...]
    """Absolute paths of the image files that are among the examples of any filter."""
    seen: int
    """Number of images searched."""
    skipped: int
    """Number of further files, which could not be read."""
    key: Mapping[str, Any]
    """Cache key of the search; see :func:`~featvis_func.examples_key`."""

    def __repr__(self) -> str:
        filters = sum(len(layer.scores) for layer in self.layers.values())
        return f"Examples({filters} filters of {len(self.layers)} layers, {self.key['count']} of {self.seen} images)"

    def __contains__(self, layer: str) -> bool:
        """Return whether there are examples of a layer or family, by any name that :meth:`of` takes."""
        return self._match(layer) is not None

    def of(self, layer: str, filter: int) -> tuple[Example, ...]:
        """Return the examples of a filter, in descending order of their scores.

        Args:
            layer: a full name, or a suffix of one that is unique among :attr:`layers`, with or without the axes after
                ``@``; or a family's label.
            filter: filter number, or the number of an image of a family, from 0.

        Raises:
            ValueError: If there is no such layer or filter.
        """
        name = self._resolve_name(layer)
        examples = self.layers[name]
        scores, pictures, positions, boxes = (column[self._row(name, filter)].tolist() for column in examples)
        return tuple(
            Example(self.files[picture], score, tuple(box), tuple(position))
            for picture, score, box, position in zip(pictures, scores, boxes, positions, strict=True)
            if picture >= 0
        )

    def _row(self, name: str, filter: int) -> int:
        """Return the row of a filter among the examples of its layer or family."""
        family = self._families.get(name, {"copies": 1, "members": None})
        copies, members = family["copies"], family["members"]
        count = len(self.layers[name].scores) * copies
        if members is None:
            if not 0 <= filter < count:
                raise ValueError(f"layer {name!r} has filters 0 to {count - 1}, got {filter}")
            return filter // copies
        row = bisect_left(members, filter // copies)
        if row == len(members) or members[row] != filter // copies:
            raise ValueError(f"{name!r} was searched for members {ranges(tuple(members))}, got {filter // copies}")
        return row

    @property
    def _families(self) -> Mapping[str, Any]:
        return self.key.get("families", {})

    def crop(self, example: Example, size: int = 112) -> PIL.Image.Image:
        """Crop the image file of an example to its box.

        Args:
            example: an element of :meth:`of`.
            size: length of the longer side of the result, in pixels, at least 1.

        Returns:
            The crop as RGB, resampled from the original resolution of the file.

        Raises:
            ValueError: If the file cannot be read or no longer contains the box, or ``size`` is below 1.
        """
        return self.crops([example], size)[0]

    def crops(self, examples: Sequence[Example], size: int = 112) -> list[PIL.Image.Image]:
        """Crop several examples, reading each image file once.

        Args:
            examples: elements of :meth:`of`.
            size: as for :meth:`crop`.

        Returns:
            The crops, in the order of ``examples``.

        Raises:
            ValueError: as for :meth:`crop`.
        """
        size = check_int("size", size, 1)
        numbers_by_path: dict[str, list[int]] = {}
        for number, example in enumerate(examples):
            numbers_by_path.setdefault(example.path, []).append(number)
        crops: dict[int, PIL.Image.Image] = {}
        for path, numbers in numbers_by_path.items():
            image = open_image(path)
            crops |= {number: _crop(image, examples[number], size) for number in numbers}
        return [crops[number] for number in range(len(examples))]

    def covers(self, key: Mapping[str, Any]) -> bool:
        """Return whether these examples include the result of a search.

        Args:
            key: key of the search, from :func:`~featvis_func.examples_key`.

        Returns:
            ``True`` if :attr:`key` contains all layers and families of ``key`` and equals it otherwise. ``False`` for a
            family whose score is a function of your own, of which no key tells whether it has changed.
        """
        families = key.get("families", {})
        if {**self.key, "layers": {}, "families": {}} != {**key, "layers": {}, "families": {}}:
            return False
        if not all(family["comparable"] for family in families.values()):
            return False
        return key["layers"].items() <= self.key["layers"].items() and families.items() <= self._families.items()

    def save(self, path: str | Path) -> Path:
        """Write the examples atomically to a safetensors file; equal examples give identical bytes.

        Args:
            path: the file to write. Missing folders are created; an existing file is replaced.

        Returns:
            The absolute path.

        Raises:
            ValueError: If the file cannot be written.
        """
        path = absolute_path(path)
        tensors = {
            f"{name}/{kind}": tensor.contiguous()
            for name, layer in self.layers.items()
            for kind, tensor in layer._asdict().items()
        }
        metadata = {
            "layers": list(self.layers),
            "files": self.files,
            "seen": self.seen,
            "skipped": self.skipped,
            "key": dict(self.key),
        }
        data = safetensors.torch.save(tensors, {"examples": json.dumps(metadata, sort_keys=True)})
        try:
            make_folder(path.parent)
            write_file(path, data)
        except OSError as error:
            raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Examples":
        """Read a file written by :meth:`save`.

        Raises:
            ValueError: If the file is missing, damaged, of another kind, or of another format version.
        """
        try:
            with safetensors.safe_open(Path(path), framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["examples"])
                version = metadata["key"]["format"]
                layers = {
                    name: LayerExamples(*(file.get_tensor(f"{name}/{kind}") for kind in LayerExamples._fields))
                    for name in (metadata["layers"] if version == FORMAT else ())
                }
        except Exception as error:  # Damaged files raise many types of exceptions.
            raise ValueError(f"{str(path)!r} cannot be read as examples: {first_line(error)}") from error
        if version != FORMAT:
            raise ValueError(f"{str(path)!r} has format {version!r}; this version reads format {FORMAT}")
        return cls(layers, tuple(metadata["files"]), metadata["seen"], metadata["skipped"], metadata["key"])

    def _resolve_name(self, layer: str) -> str:
        """Return the full name of a layer."""
        name = self._match(layer)
        if name is None:
            hint = suggest(layer, list(self.layers)) or f"; the layers are {', '.join(self.layers)}"
            raise ValueError(f"no examples of layer {layer!r}{hint}")
        return name

    def _match(self, layer: str) -> str | None:
        """Return the full name of a layer, if there is one such layer."""
        without_axes = layer.rpartition("@")[0]
        layer = without_axes if without_axes and layer not in self.layers else layer
        if layer in self.layers:
            return layer
        names = self.layers.keys() - self._families.keys()
        matches = [name for name in names if layer and name.endswith("." + layer)]
        return matches[0] if len(matches) == 1 else None


def _crop(image: PIL.Image.Image, example: Example, size: int) -> PIL.Image.Image:
    left, top, right, bottom = example.box
    outside = right > image.width + _BOX_TOLERANCE or bottom > image.height + _BOX_TOLERANCE
    if outside or min(left, top) < -_BOX_TOLERANCE:
        raise ValueError(
            f"{example.path} has {image.width} x {image.height} pixels, which do not contain the box {example.box};"
            f" the file has changed since the search"
        )
    box = (max(left, 0.0), max(top, 0.0), min(right, float(image.width)), min(bottom, float(image.height)))
    w, h = right - left, bottom - top
    shape = (max(1, round(size * w / max(w, h))), max(1, round(size * h / max(w, h))))
    return image.resize(shape, PIL.Image.Resampling.BICUBIC, box=box)
