"""Search of a family of objectives: an image's score is the objective's own score of each member.

Memory is bounded whatever the number of members: scores are computed for one image and as many members at a time as fit
into :data:`MOST_NUMBERS`, and maps only for the images that are among a member's best.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from featvis_func.dataset.best import Top, keep_best
from featvis_func.dataset.places import Reading, reading_of
from featvis_func.objective import IMAGE, Objective, feature_axis
from featvis_func.objective.base import features_last
from featvis_func.objective.expression import Call, Expression, Scaled
from featvis_func.rendering.resolve import select_members
from featvis_func.types import Activations

MOST_NUMBERS = 2**25
"""Numbers in the products of some members with the activations of an image: 128 MiB of float32."""


@dataclass(frozen=True)
class FamilySearch:
    """The search for the best images of some members of a family. Make one with :func:`family_search`."""

    objective: Objective
    targets: Tensor
    """int64 ``(F,)``: the target of each member."""
    size: int
    """Numbers in the activations that the objective reads of one image."""
    sides: tuple[int, ...]
    """Shape of the objective's map."""
    on_map: bool
    """Whether a place of the map is a position of the main layer."""
    reading: Reading
    vectors: Tensor | None
    """``(n, d)``, if the map of member ``i`` is the product of the activations with row ``i``, up to a constant."""

    @property
    def layer(self) -> str:
        """The main layer."""
        return self.objective.layers[0]

    @property
    def members(self) -> int:
        """Number of members."""
        return len(self.targets)

    def update(self, top: Top, activations: Activations, numbers: Tensor) -> Top:
        """Merge a batch into the best so far, see :class:`~featvis_func.dataset.layers.LayerSearch`.

        Args:
            top: the best so far.
            activations: layer -> ``(b, ...)``, of which the first ``n`` count, and the images themselves.
            numbers: int64 ``(n,)``: indices of the files.
        """
        read = {name: activations[name].float() for name in (*self.objective.layers, IMAGE)}
        # One image after the other, whatever the batch: equal images have equal scores, to the last bit.
        scores = torch.stack([self._scores(_of_image(read, i)) for i in range(len(numbers))]).float()
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        # Until it is known which images are among the best, their places are -2 minus their numbers in the batch.
        rows_of_batch = -2 - torch.arange(len(numbers), device=scores.device)
        top = keep_best(top, scores, rows_of_batch[:, None].expand_as(scores), numbers)
        rows, columns = (top.places < -1).nonzero(as_tuple=True)
        if not len(rows):
            return top
        places = self._places(read, -2 - top.places[rows, columns], rows)
        return top._replace(places=top.places.index_put((rows, columns), places))

    def _scores(self, activations: Activations) -> Tensor:
        """The scores of one image, ``(F,)``."""
        all_scores = None if self.objective.family is None else self.objective.family.all_scores
        if all_scores is not None:
            return all_scores(activations)[self.targets]
        score = vmap(self.objective.score, (None, 0))
        return torch.cat([score(activations, targets) for targets in self.targets.split(self._at_once)])

    @property
    def _at_once(self) -> int:
        """Members whose products with the activations of one image are in memory together."""
        return max(1, MOST_NUMBERS // self.size)

    def _places(self, activations: Activations, images: Tensor, members: Tensor) -> Tensor:
        """The places of the scores of pairs of an image of the batch and a member, int64 ``(p,)``."""
        places = torch.zeros_like(members)
        if not self.sides:
            return places
        if self.reading.places is not None:
            known = self.reading.places.to(members.device)
            return known[self.targets[members] % len(known)]
        activation_map = vmap(self.objective.activation_map, (None, 0))
        for image in images.unique().tolist():
            values = _of_image(activations, image)
            pixels = None if self.vectors is None else features_last(values[self.layer]).flatten(0, -2)
            at_once = self._at_once if pixels is None else max(1, MOST_NUMBERS // max(pixels.shape))
            for pairs in (images == image).nonzero()[:, 0].split(at_once):
                targets = self.targets[members[pairs]]
                if self.vectors is None or pixels is None:
                    maps = activation_map(values, targets).flatten(1)
                else:
                    maps = self.vectors[targets] @ pixels.T
                places[pairs] = (self.reading.sign * maps).argmax(1)
        return places


def family_search(
    label: str,
    objective: Objective,
    filters: Sequence[int] | None,
    shapes: Mapping[str, tuple[int, ...]],
    image_shape: tuple[int, ...],
    device: torch.device,
) -> FamilySearch:
    """Prepare the search of a family, and check that it fits its layers.

    Args:
        label: of the family, for error messages.
        objective: of which the target picks a member, or a channel.
        filters: numbers of members, see :func:`chosen_members`; ``None``: all.
        shapes: layer -> shape of its activations for one image.
        image_shape: ``(c, h, w)`` of the model's input.
        device: where to search.

    Raises:
        ValueError: the objective does not fit its layers, the family has no such member, or a score that is not one
            number.
    """
    layer = objective.layers[0]
    widths = {name: shapes[name][feature_axis(shapes[name])] for name in objective.targeted}
    images = select_members(objective, widths, None)
    copies = copies_of(objective)
    members = chosen_members(objective, images if filters is None else filters)
    count = len(images) // copies
    # An objective that picks nothing describes any number of equal images.
    known = count if objective.targeted or objective.variants is not None else max(members, default=0) + 1
    outside = [member for member in members if not 0 <= member < known]
    if outside or not members:
        raise ValueError(f"{label} has members 0 to {count - 1}, got {outside[0] if outside else 'none'}")
    # Outside of function transforms, where the objective's tensors are copied to the device once.
    zeros = {name: torch.zeros(shapes[name], device=device) for name in objective.layers}
    zeros[IMAGE] = torch.zeros(image_shape, device=device)
    target = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        score, map_of_zeros = objective.score(zeros, target), objective.activation_map(zeros, target)
        if objective.family is not None and objective.family.all_scores is not None:
            objective.family.all_scores(zeros)
    if score.ndim:
        raise ValueError(f"{label}: the score of an image must be one number, got a tensor {tuple(score.shape)}")
    sides = tuple(map_of_zeros.shape)
    axis = feature_axis(shapes[layer])
    return FamilySearch(
        objective,
        torch.tensor(members, device=device) * copies,
        sum(math.prod(shapes[name]) for name in objective.layers),
        sides,
        bool(sides) and sides == tuple(shapes[layer][:axis] + shapes[layer][axis + 1 :]),
        reading_of(objective.expression_or_name, layer, sides),
        _vectors(objective, device),
    )


def _vectors(objective: Objective, device: torch.device) -> Tensor | None:
    """The directions of a family whose maps are products with them, up to a constant for each member."""
    expression, family = _unscaled(objective), objective.family
    if not isinstance(expression, Call) or family is None or family.vectors is None:
        return None
    nonlinear = {"directions": "similarity", "sae": "activation"}.get(expression.function)
    if nonlinear is None or nonlinear in dict(expression.keywords):
        return None
    return family.rows[family.vectors].to(device, torch.float32)


def _unscaled(objective: Objective) -> Expression | None:
    expression = objective.expression
    while isinstance(expression, Scaled):
        expression = expression.inner
    return expression


def copies_of(objective: Objective) -> int:
    """The number of successive images that have the same member, and so the same examples.

    >>> from featvis_func.objective import facets, neurons
    >>> copies_of(facets(neurons("conv", 3, [(0, 1)]), 4)), copies_of(neurons("conv", 3, [(0, 1)]))
    (4, 1)
    """
    expression = _unscaled(objective)
    # The other terms of a sum may tell the facets of a member apart.
    is_facets = isinstance(expression, Call) and expression.function == "facets"
    return objective.family.copies if is_facets and objective.family is not None else 1


def chosen_members(objective: Objective, filters: Sequence[int]) -> list[int]:
    """The members of some images of a family, in ascending order.

    >>> from featvis_func.objective import facets, neurons
    >>> chosen_members(facets(neurons("conv", [3, 5], [(0, 1)]), 4), [7, 6, 5, 4])
    [1]
    """
    return sorted({number // copies_of(objective) for number in filters})


def _of_image(activations: Activations, number: int) -> dict[str, Tensor]:
    """Copy the activations of one image: how products of matrices round depends on how tensors are aligned."""
    return {name: values[number].clone() for name, values in activations.items()}
