"""Search image files for those that activate each filter most, in one pass over the files."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featvis_func.backbone.features import device_of, make_features
from featvis_func.backbone.receptive_field import Field, receptive_fields
from featvis_func.dataset.best import Top, empty_top
from featvis_func.dataset.families import FamilySearch, family_search
from featvis_func.dataset.key import Requested, list_files, make_key, requests_of
from featvis_func.dataset.layers import LayerSearch
from featvis_func.dataset.reading import read_batches
from featvis_func.dataset.record import Examples, LayerExamples
from featvis_func.engine.device import check_device
from featvis_func.io.image_files import center_crop, check_channels
from featvis_func.models import Model, load_model
from featvis_func.objective import IMAGE
from featvis_func.rendering.input_size import KINDS, with_input_size
from featvis_func.rendering.spec import Selection
from featvis_func.validation import check_int

_MAX_NAMED = 3  # unreadable files that the warning names


def top_examples(
    model: str | nn.Module | Model,
    layers: Requested | Iterable[Requested] | Mapping[str, Requested],
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
    once among the examples of a filter. For a family of objectives, such as :func:`~featvis_func.directions`, it is the
    objective's own score of each member: the mean over all positions, or the value at the family's position; without
    what depends on other images, so that all facets of a member have the same examples. The region is then that of the
    position which the score reads, or else where the objective's map is largest (smallest, for an objective multiplied
    by a negative number); the whole image, if the map is not one of the positions of its main layer.

    Images are rotated upright according to EXIF, resized so that they cover the model's input size, and cropped to its
    centre; large JPEGs are decoded at a reduced size of at least twice that.

    All layers and families share one forward pass. Memory holds the activations of one batch and grows with the number
    of images only by their paths; a family's members are scored a bounded number at a time. The receptive fields are
    measured first, which takes as long as ``h + w`` images.

    Args:
        model: as for :func:`~featvis_func.render`. It is not modified.
        layers: layer names, as for :func:`~featvis_func.make_features`; objectives, each of which is a family of as
            many members as its target can pick; or a mapping from labels to objectives. A family's label is by default
            its own, such as ``"directions:blocks.5"``, and that of another objective the code that makes it. A layer
            goes by its full name. A :class:`~featvis_func.rendering.spec.Selection` stands for some members of a
            family.
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
        ValueError: If an argument is invalid, an objective does not fit its layers or compares images with a picture,
            the model takes no images ``(c, h, w)``, or no file can be read.

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
    requests = requests_of(loaded, layers)
    check_channels(loaded.channels)
    if device is not None:
        check_device(device)
    files = list_files(images)
    loaded = with_input_size(loaded, None, stacklevel=3)
    size = loaded.size[0], loaded.size[1]
    batch_size = min(batch_size, len(files))
    key = make_key(loaded, requests, files, count=count, precision=precision)
    names = {
        label: request.objective.layers if isinstance(request, Selection) else (_with_axes(label, request),)
        for label, request in requests.items()
    }
    read = list(dict.fromkeys(name for several in names.values() for name in several))
    features = make_features(loaded, read, device=device, precision=precision)
    model_device = device_of(features)
    image_shape = (loaded.channels, *size)
    searches: dict[str, LayerSearch | FamilySearch] = {
        label: family_search(label, request.objective, request.filters, features.shapes, image_shape, model_device)
        if isinstance(request, Selection)
        else LayerSearch(names[label][0], features.shapes[names[label][0]])
        for label, request in requests.items()
    }
    fields = receptive_fields(features, image_shape, batch_size=batch_size)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=model_device)[:, None, None]
        for values in (loaded.mean, loaded.std)
    )
    sizes = torch.zeros(len(files), 2, dtype=torch.int32)
    tops = {label: empty_top(search.members, count, model_device) for label, search in searches.items()}
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
            inputs = padded.to(model_device).float() / 255
            activations = {**features.apply(features.weights, (inputs - mean) / std), IMAGE: inputs}
            for label, search in searches.items():
                tops[label] = search.update(tops[label], activations, numbers.to(model_device))
            bar.update(len(pixels))
    if len(errors) == len(files):
        raise ValueError(f"none of {len(files)} image files could be read; the first: {errors[0]}")
    if errors:
        more = f"; and {len(errors) - _MAX_NAMED} more" if len(errors) > _MAX_NAMED else ""
        shown = "; ".join(errors[:_MAX_NAMED])
        warnings.warn(f"skipped {len(errors)} of {len(files)} image files: {shown}{more}", stacklevel=2)
    results = {
        label: _locate(
            Top(*(column.cpu() for column in top)),
            searches[label].sides,
            fields[searches[label].layer] if searches[label].on_map else None,
            sizes,
            size,
        )
        for label, top in tops.items()
    }
    results, used = _keep_used_files(results)
    return Examples(results, tuple(str(files[i]) for i in used), len(files) - len(errors), len(errors), key)


def _with_axes(layer: str, axes: str | None) -> str:
    return layer if axes is None else f"{layer}@{axes}"


def _locate(
    top: Top, sides: tuple[int, ...], field: Field | None, sizes: Tensor, size: tuple[int, int]
) -> LayerExamples:
    """Compute the positions and boxes of the examples of a layer or family.

    Args:
        top: the best images.
        sides: number of positions along each axis of the map.
        field: receptive field of the layer; ``None``: the whole input.
        sizes: ``(files, 2)``: height and width of each image file.
        size: ``(h, w)`` of the model's input.
    """
    missing = (top.pictures < 0)[..., None]
    places = top.places.clamp_min(0)
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
