"""What is recorded of a rendering: the configuration that its images depend on, as JSON holds it."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featvis_func.engine.batching import RunResult
from featvis_func.models import Model
from featvis_func.objective import Family, Objective
from featvis_func.objective.expression import Call, call, has_user_objective, tensors_of, to_code
from featvis_func.rendering.options import RenderOptions
from featvis_func.rendering.result import Result


def make_config(
    model: Model, objective: Objective, options: RenderOptions, *, layer: str, size: Sequence[int], precision: str,
    device: str, alpha: bool,
) -> dict[str, Any]:  # fmt: skip
    """What the images depend on.

    Args:
        model, objective, options: of the rendering.
        layer: full name of the objective's main layer; a family has its label in its place.
        size: of the images.
        precision: of the backbone's weights.
        device: type of the device.
        alpha: whether the images have an opacity.
    """
    return {
        **options.to_json(),
        "model": model.name,
        "weights": model.weights,
        "layer": layer,
        **describe_objective(objective),
        "size": list(size),
        "input_size": list(model.size),
        "mean": list(model.mean),
        "std": list(model.std),
        "precision": precision,
        "device": device,
        **({"stated": list(model.stated)} if model.stated else {}),
        **({"alpha": True} if alpha else {}),
    }


def describe_objective(objective: Objective) -> dict[str, Any]:
    """An objective's name and code; of a family also its label as ``"layer"``, and what its members depend on.

    >>> from featvis_func.objective import logits
    >>> described = describe_objective(logits("head", [3, 5]))
    >>> described["layer"], described["family"]["layers"], described["family"]["tensors"]
    ('logit:head', ['head'], {})
    """
    described, family = describe_code(objective), objective.family
    if family is None:
        return described
    return {**described, "layer": family.label, "family": describe_members(objective)}


def describe_code(objective: Objective) -> dict[str, Any]:
    """An objective's name, and how it is written in Python; ``None`` for the code of the channels of a layer."""
    return {"objective": repr(objective), "objective_code": _objective_code(objective)}


def describe_members(objective: Objective) -> dict[str, Any]:
    """What the images of an objective depend on, beside its code."""
    command = None if objective.family is None else objective.family.command
    return {
        "layers": list(objective.layers),
        "group": objective.group,
        "tensors": describe_tensors(member_tensors(objective)),
        **({} if command is None else {"command": list(command)}),
    }


def label_of(objective: Objective) -> str:
    """An objective's name among several: the family's label, or the code that makes it.

    >>> from featvis_func.objective import channel, neurons
    >>> label_of(neurons("conv", 1, [0])), label_of(-channel("conv"))
    ('neuron:conv', "-1 * channel('conv')")
    """
    return str(objective) if objective.family is None else objective.family.label


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The shape, the dtype and the SHA-256 of each tensor's numbers, as JSON holds them."""
    return {
        name: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch."), "sha256": _digest(v)}
        for name, v in tensors.items()
    }


def member_tensors(objective: Objective) -> dict[str, Tensor]:
    """The tensors from which a family can be made again: those that its code refers to, or the rows of a family of the
    user's own."""
    rows = {} if objective.family is None else dict(objective.family.rows)
    if objective.expression is None:
        return rows
    tensors = tensors_of(objective.expression)
    if has_user_objective(objective.expression):  # whose rows the code does not tell
        tensors |= {f"rows of {name}": values for name, values in rows.items()}
    return tensors


def _objective_code(objective: Objective) -> dict[str, Any] | None:
    """How the objective is written in Python, as JSON holds it; ``None``: the channel of each filter."""
    if isinstance(objective.expression, Call) and objective.expression == call("channel", *objective.layers):
        return None
    code = to_code(objective.expression_or_name)
    return {**code._asdict(), "functions": list(code.functions)}


def _digest(values: Tensor) -> str:
    """The SHA-256 of a tensor's numbers."""
    numbers = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers.data).hexdigest()


def make_result(run: RunResult, filters: Sequence[int], config: dict[str, Any], family: Family | None) -> Result:
    """The result of a run, with the status of each filter, and the name and direction of each member of a family."""
    best, info = run.best, run.info
    vectors = None
    if family is not None:
        if family.names is not None:
            config = {**config, "names": {str(number): family.name_of(number) for number in filters}}
        if family.vectors is not None:
            vectors = family.rows[family.vectors][[number // family.copies for number in filters]].float()
    taken = torch.arange(len(info.score))[:, None] < run.steps
    alive, finite = info.alive.any(0).tolist(), (info.finite | ~taken).all(0).tolist()
    scores = torch.where(info.finite, info.score, -torch.inf)
    rose = ((scores.amax(0) > scores[0]) | (run.steps == 1)).tolist()
    status = tuple(
        "nonfinite" if not f else "dead" if not a else "ok" if r else "flat"
        for f, a, r in zip(finite, alive, rose, strict=True)
    )
    return Result(
        images=best.image,
        activations=best.activation.float(),
        scores=best.score.float(),
        best_step=best.step,
        filters=tuple(filters),
        status=status,
        history=info.score.float(),
        steps=run.steps,
        saliency=run.saliency,
        snapshots=run.snapshots,
        config=config,
        vectors=vectors,
    )
