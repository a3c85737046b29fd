"""The search: photographs stream through a model once, and each filter keeps the few that excite it most."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featvis_func.backbone.features import device_of, make_features
from featvis_func.backbone.receptive_field import Field, receptive_fields
from featvis_func.dataset.key import key_of, layer_axes, listed
from featvis_func.dataset.reading import batches
from featvis_func.dataset.record import Examples, LayerExamples
from featvis_func.engine.device import check_device
from featvis_func.io.image_files import check_channels, seen_part
from featvis_func.models import Model, load_model
from featvis_func.objective import feature_axis
from featvis_func.validation import check_int

_NAMED = 3  # files that a warning names


class Top(NamedTuple):
    """The best so far of each filter: falling scores, equal ones in the order of the files."""

    scores: Tensor
    """``(F, k)``, ``-inf`` where there are fewer."""
    pictures: Tensor
    """int64 ``(F, k)``: numbers of files."""
    places: Tensor
    """int64 ``(F, k)``: of the maximum among all positions."""


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
    """The photographs that excite each filter of some layers most, each with the part that does.

    A photograph's score is the maximum of the filter's activations over all positions, so that it is among a filter's
    at most once. It is seen upright, its shorter side resized to the model's input size, and cropped about the
    centre; a large JPEG is decoded at a reduced size of at least twice that. All layers share one forward pass, and
    memory holds their activations for one batch; it does not grow with the photographs, but for their names. Before
    the first photograph, receptive fields are measured, which takes as long as ``h + w`` photographs.

    Args:
        model: as for :func:`~featvis_func.render`. Left exactly as it was.
        layers: names of layers, as for :func:`~featvis_func.make_features`.
        images: a folder, whose picture files are read, those of its folders too; or files.
        count: photographs for each filter, at least 1.
        batch_size: photographs at a time. The last batch is padded; other sizes change scores by no more than rounding.
        device: where to compute. Default: where the model is.
        precision: of the model, one of :data:`~featvis_func.backbone.verify.PRECISIONS`.
        progress: a progress bar on the standard error. Default: if that is a terminal.

    Returns:
        An :class:`~featvis_func.Examples`. Equal scores are in the order of the files' names, so that equal
        runs on one machine are equal. Files that cannot be read are left out, and counted in one warning.

    Raises:
        ValueError: bad input, or no file could be read.

    Source: Zeiler and Fergus, arXiv 1311.2901, section 3 and figure 2: the strongest activations of each map, and the
    patches that cause them. Deviation: patches at a border are shifted inside, see :class:`~featvis_func.backbone.receptive_field.Field`.
    """
    found = load_model(model)
    count, batch_size = check_int("count", count, 1), check_int("batch_size", batch_size, 1)
    axes = layer_axes(found, layers)
    check_channels(found.channels)
    if device is not None:
        check_device(device)
    files = listed(images)
    batch_size = min(batch_size, len(files))
    key = key_of(found, axes, files, count=count, precision=precision)
    names = {path: path if stated is None else f"{path}@{stated}" for path, stated in axes.items()}
    features = make_features(found, list(names.values()), device=device, precision=precision)
    fields = receptive_fields(features, (found.channels, *found.size), batch_size=batch_size)
    where = device_of(features)
    mean, std = (torch.tensor(values, device=where)[:, None, None] for values in (found.mean, found.std))
    sizes = torch.zeros(len(files), 2, dtype=torch.int32)
    shapes = {path: features.shapes[name] for path, name in names.items()}
    widths = {path: shape[feature_axis(shape)] for path, shape in shapes.items()}
    tops = {path: _empty(width, count, where) for path, width in widths.items()}
    bad: list[tuple[Path, str]] = []
    bar = tqdm(total=len(files), unit="picture", leave=False, disable=None if progress is None else not progress)
    stream = batches(
        files, found.size, channels=found.channels, batch_size=batch_size,
        skipped=lambda path, why: (bad.append((path, why)), bar.update()),
    )  # fmt: skip
    with bar, torch.no_grad():
        for pixels, numbers, whole_sizes in stream:
            sizes[numbers] = whole_sizes.int()
            short = batch_size - len(pixels)
            padded = torch.cat([pixels, pixels[-1:].expand(short, -1, -1, -1)]) if short else pixels
            seen = features.apply(features.weights, (padded.to(where).float() / 255 - mean) / std)
            for path, name in names.items():
                scores, places = _strongest(seen[name][: len(pixels)], tops[path])
                tops[path] = keep_best(tops[path], scores, places, numbers.to(where))
            bar.update(len(pixels))
    if len(bad) == len(files):
        raise ValueError(f"none of {len(files)} picture files could be read; the first: {bad[0][1]}")
    if bad:
        some = "; ".join(why for _, why in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        warnings.warn(f"left out {len(bad)} of {len(files)} pictures: {some}{more}", stacklevel=2)
    results = {
        path: _located(Top(*(column.cpu() for column in top)), shapes[path], fields[names[path]],
                       sizes, found.size)
        for path, top in tops.items()
    }  # fmt: skip
    compact, used = _compacted(results)
    return Examples(compact, tuple(str(files[i]) for i in used), len(files) - len(bad), len(bad), key)


def keep_best(top: Top, scores: Tensor, places: Tensor, numbers: Tensor) -> Top:
    """The best of those so far and some new ones.

    Args:
        top: of ``F`` filters.
        scores: ``(n, F)``, without NaN; ``-inf`` is never kept.
        places: int64 ``(n, F)``.
        numbers: int64 ``(n,)``: rising, and above all that came before.

    >>> first = torch.tensor([[1.0], [3.0]]), torch.tensor([[5], [6]]), torch.tensor([0, 1])
    >>> then = torch.tensor([[3.0], [2.0]]), torch.tensor([[7], [8]]), torch.tensor([2, 3])
    >>> keep_best(keep_best(_empty(1, 2, "cpu"), *first), *then)
    Top(scores=tensor([[3., 3.]]), pictures=tensor([[1, 2]]), places=tensor([[6, 7]]))
    """
    # Later on few photographs change anything, and most filters need no sorting.
    rows = (scores > top.scores[:, -1]).any(0).nonzero()[:, 0]
    if not len(rows):
        return top
    new = Top(scores.T[rows], numbers.expand(len(rows), -1), places.T[rows])
    both = Top(*(torch.cat([old[rows], own], dim=1) for old, own in zip(top, new, strict=True)))
    order = both.scores.sort(dim=1, descending=True, stable=True).indices[:, : top.scores.shape[1]]
    return Top(*(old.index_copy(0, rows, all.gather(1, order)) for old, all in zip(top, both, strict=True)))


def _empty(filters: int, count: int, device: torch.device | str) -> Top:
    nothing = torch.full((filters, count), -1, device=device)
    return Top(torch.full((filters, count), -torch.inf, device=device), nothing, nothing)


def _strongest(values: Tensor, top: Top) -> tuple[Tensor, Tensor]:
    """Of activations ``(n, c, h, w)``, ``(n, t, d)`` or ``(n, d)``: each feature's maximum and its place, ``(n, F)``.

    The maximum is ``-inf`` where any activation is not a number. The place is the first, if there are several, and 0
    where the maximum is not among the best.
    """
    n, features = len(values), values.shape[-1]
    flat = values.flatten(2) if values.ndim == 4 else values.reshape(n, -1, features).transpose(1, 2)
    scores = flat.amax(2).float()
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    wanted = scores > top.scores[:, -1]
    # Finding the place takes several times as long as finding the maximum, and is seldom needed.
    places = torch.zeros_like(scores, dtype=torch.int64).masked_scatter(wanted, flat[wanted].argmax(1))
    return scores, places


def _located(
    top: Top, shape: Sequence[int], field: Field | None, sizes: Tensor, size: tuple[int, int]
) -> LayerExamples:
    """Positions and boxes of a layer whose output for one image has this shape."""
    there = top.pictures >= 0
    places = top.places.clamp_min(0)
    if len(shape) == 3:
        positions = torch.stack([places // shape[2], places % shape[2]], dim=-1)
    else:
        positions = places[..., None] if len(shape) == 2 else places[..., None][..., :0]
    h, w = size
    boxes = torch.tensor([0.0, 0.0, w, h]).expand(*places.shape, 4) if field is None else field.boxes(positions)
    part = seen_part(sizes[top.pictures.clamp_min(0)].float(), size)
    corner = torch.stack([part.left, part.top] * 2, dim=-1)
    boxes = corner + boxes * part.scale[..., None]
    return LayerExamples(
        top.scores,
        top.pictures,
        positions.masked_fill(~there[..., None], -1),
        boxes.masked_fill(~there[..., None], 0.0),
    )


def _compacted(results: Mapping[str, LayerExamples]) -> tuple[dict[str, LayerExamples], list[int]]:
    """The same with numbers among those files alone that are used, and these."""
    used = torch.cat([layer.pictures.flatten() for layer in results.values()]).unique()
    used = used[used >= 0]
    compact = {}
    for path, layer in results.items():
        pictures = torch.searchsorted(used, layer.pictures.clamp_min(0)).where(layer.pictures >= 0, -1)
        compact[path] = layer._replace(pictures=pictures)
    return compact, used.tolist()
