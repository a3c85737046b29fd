"""Search image files for those that activate each filter most, in one pass over the files."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featvis_func.backbone.features import device_of, make_features
from featvis_func.backbone.receptive_field import Field, receptive_fields
from featvis_func.dataset.key import layer_axes, list_files, make_key
from featvis_func.dataset.reading import read_batches
from featvis_func.dataset.record import Examples, LayerExamples
from featvis_func.engine.device import check_device
from featvis_func.io.image_files import center_crop, check_channels
from featvis_func.models import Model, load_model
from featvis_func.objective import feature_axis
from featvis_func.rendering.input_size import KINDS, with_input_size
from featvis_func.validation import check_int

_MAX_NAMED = 3  # unreadable files that the warning names


class Top(NamedTuple):
    """The best images of each filter so far: scores in descending order, equal scores in the order of the files."""

    scores: Tensor
    """``(F, k)``; missing entries are ``-inf``."""
    pictures: Tensor
    """int64 ``(F, k)``: indices into the list of files; missing entries are -1."""
    places: Tensor
    """int64 ``(F, k)``: flat index of the maximum over all positions; missing entries are -1."""


def top_examples(
    model: str | nn.Module | Model,
    layers: str | Sequence[str],
    images: str | Path | Iterable[str | Path],
    *,
    count: int = 9,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    precision: str = "float32",
    progress: bool | None = None,
) -> Examples:
    """Find the images that activate each filter of some layers most, and the region of each image responsible.

    The score of an image is the maximum of the filter's activations over all positions, so an image occurs at most
    once among the examples of a filter. Images are rotated upright according to EXIF, resized so that they cover the
    model's input size, and cropped to its centre; large JPEGs are decoded at a reduced size of at least twice that.

    All layers share one forward pass. Memory holds the activations of one batch and grows with the number of images
    only by their paths. The receptive fields are measured first, which takes as long as ``h + w`` images.

    Args:
        model: as for :func:`~featvis_func.render`. It is not modified.
        layers: layer names, as for :func:`~featvis_func.make_features`.
        images: a folder, which is searched recursively for image files; or paths of files.
        count: number of examples per filter, at least 1.
        batch_size: images per forward pass, at least 1. The last batch is padded. The scores depend on it only by
            rounding errors.
        device: where to compute. Default: the device of the model.
        precision: precision of the model, one of :data:`~featvis_func.backbone.verify.PRECISIONS`.
        progress: whether to show a progress bar on stderr. Default: only if stderr is a terminal.

    Returns:
        An :class:`~featvis_func.Examples`. Images with equal scores are in the order of their paths, so that the
        result is reproducible on one machine. Files that cannot be read are skipped with one warning.

    Raises:
        ValueError: If an argument is invalid, the model takes no images ``(c, h, w)``, or no file can be read.

    Source: Zeiler and Fergus, arXiv 1311.2901, section 3 and figure 2: the strongest activations of each map, and the
    patches that cause them. Deviation: patches at a border are shifted inside, see
    :class:`~featvis_func.backbone.receptive_field.Field`.
    """
    loaded = load_model(model)
    if len(loaded.size) != 2:
        kind = KINDS[len(loaded.size)]
        raise ValueError(
            f"top examples are photographs, for models of images (c, h, w); {loaded.name} takes {kind.plural} (c,"
            f" {kind.axes})"
        )
    count, batch_size = check_int("count", count, 1), check_int("batch_size", batch_size, 1)
    axes = layer_axes(loaded, layers)
    check_channels(loaded.channels)
    if device is not None:
        check_device(device)
    files = list_files(images)
    loaded = with_input_size(loaded, None, stacklevel=3)
    size = loaded.size[0], loaded.size[1]
    batch_size = min(batch_size, len(files))
    key = make_key(loaded, axes, files, count=count, precision=precision)
    names = {path: path if stated is None else f"{path}@{stated}" for path, stated in axes.items()}
    features = make_features(loaded, list(names.values()), device=device, precision=precision)
    fields = receptive_fields(features, (loaded.channels, *size), batch_size=batch_size)
    model_device = device_of(features)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=model_device)[:, None, None]
        for values in (loaded.mean, loaded.std)
    )
    sizes = torch.zeros(len(files), 2, dtype=torch.int32)
    shapes = {path: features.shapes[name] for path, name in names.items()}
    filters = {path: shape[feature_axis(shape)] for path, shape in shapes.items()}
    tops = {path: _empty_top(number, count, model_device) for path, number in filters.items()}
    errors: list[str] = []
    bar = tqdm(total=len(files), unit="image", leave=False, disable=None if progress is None else not progress)
    batches = read_batches(
        files, size, channels=loaded.channels, batch_size=batch_size,
        on_error=lambda _, message: (errors.append(message), bar.update()),
    )  # fmt: skip
    with bar, torch.no_grad():
        for pixels, numbers, file_sizes in batches:
            sizes[numbers] = file_sizes.int()
            missing = batch_size - len(pixels)
            padded = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels
            activations = features.apply(features.weights, (padded.to(model_device).float() / 255 - mean) / std)
            for path, name in names.items():
                scores, places = _max_over_positions(activations[name][: len(pixels)], tops[path])
                tops[path] = keep_best(tops[path], scores, places, numbers.to(model_device))
            bar.update(len(pixels))
    if len(errors) == len(files):
        raise ValueError(f"none of {len(files)} image files could be read; the first: {errors[0]}")
    if errors:
        more = f"; and {len(errors) - _MAX_NAMED} more" if len(errors) > _MAX_NAMED else ""
        shown = "; ".join(errors[:_MAX_NAMED])
        warnings.warn(f"skipped {len(errors)} of {len(files)} image files: {shown}{more}", stacklevel=2)
    results = {
        path: _locate(Top(*(column.cpu() for column in top)), shapes[path], fields[names[path]], sizes, size)
        for path, top in tops.items()
    }
    results, used = _keep_used_files(results)
    return Examples(results, tuple(str(files[i]) for i in used), len(files) - len(errors), len(errors), key)


def keep_best(top: Top, scores: Tensor, places: Tensor, numbers: Tensor) -> Top:
    """Merge the scores of a batch into the best so far.

    Args:
        top: the best so far, for ``F`` filters.
        scores: ``(n, F)``, without NaN. Entries of ``-inf`` are never kept.
        places: int64 ``(n, F)``: flat indices of the maxima.
        numbers: int64 ``(n,)``: indices of the files, ascending and larger than all in ``top``.

    Returns:
        The best of both.

    >>> first = torch.tensor([[1.0], [3.0]]), torch.tensor([[5], [6]]), torch.tensor([0, 1])
    >>> then = torch.tensor([[3.0], [2.0]]), torch.tensor([[7], [8]]), torch.tensor([2, 3])
    >>> keep_best(keep_best(_empty_top(1, 2, "cpu"), *first), *then)
    Top(scores=tensor([[3., 3.]]), pictures=tensor([[1, 2]]), places=tensor([[6, 7]]))
    """
    # After the first batches, few images improve on the best so far: sort only the filters that they do improve.
    rows = (scores > top.scores[:, -1]).any(0).nonzero()[:, 0]
    if not len(rows):
        return top
    new = Top(scores.T[rows], numbers.expand(len(rows), -1), places.T[rows])
    merged = Top(*(torch.cat([old[rows], own], dim=1) for old, own in zip(top, new, strict=True)))
    order = merged.scores.sort(dim=1, descending=True, stable=True).indices[:, : top.scores.shape[1]]
    return Top(*(old.index_copy(0, rows, both.gather(1, order)) for old, both in zip(top, merged, strict=True)))


def _empty_top(filters: int, count: int, device: torch.device | str) -> Top:
    missing = torch.full((filters, count), -1, device=device)
    return Top(torch.full((filters, count), -torch.inf, dtype=torch.float32, device=device), missing, missing)


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


def _locate(top: Top, shape: Sequence[int], field: Field | None, sizes: Tensor, size: tuple[int, int]) -> LayerExamples:
    """Compute the positions and boxes of a layer's examples.

    Args:
        top: the best images.
        shape: shape of the layer's output for one image.
        field: receptive field of the layer; ``None``: the whole input.
        sizes: ``(files, 2)``: height and width of each image file.
        size: ``(h, w)`` of the model's input.
    """
    missing = (top.pictures < 0)[..., None]
    places = top.places.clamp_min(0)
    sides = tuple(side for axis, side in enumerate(shape) if axis != feature_axis(tuple(shape)))
    positions = torch.stack(torch.unravel_index(places, sides), dim=-1) if sides else places[..., None][..., :0]
    h, w = size
    boxes = (
        torch.tensor([0.0, 0.0, w, h], dtype=torch.float32).expand(*places.shape, 4)
        if field is None
        else field.boxes(positions)
    )
    crop = center_crop(sizes[top.pictures.clamp_min(0)].float(), size)
    corner = torch.stack([crop.left, crop.top] * 2, dim=-1)
    boxes = corner + boxes * crop.scale[..., None]
    return LayerExamples(top.scores, top.pictures, positions.masked_fill(missing, -1), boxes.masked_fill(missing, 0.0))


def _keep_used_files(results: Mapping[str, LayerExamples]) -> tuple[dict[str, LayerExamples], list[int]]:
    """Renumber the files so that only those among the examples count, and return the indices of these."""
    used = torch.cat([layer.pictures.flatten() for layer in results.values()]).unique()
    used = used[used >= 0]
    renumbered = {}
    for path, layer in results.items():
        pictures = torch.searchsorted(used, layer.pictures.clamp_min(0)).where(layer.pictures >= 0, -1)
        renumbered[path] = layer._replace(pictures=pictures)
    return renumbered, used.tolist()
