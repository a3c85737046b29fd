"""The Python call that renders an image again, for objectives and parts that a record cannot hold."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func import objective as o
from featvis_func.gallery.reproduce import reproduce
from featvis_func.models import Model

QUICK: dict[str, Any] = {"steps": 2, "precision": "float32"}
VECTOR = torch.arange(12.0) - 3


def again(result: fv.Result, number: int, **supplied: Any) -> fv.Result:
    """Run the recorded call with the values that it asks for."""
    reproduction = reproduce(result.config, result.config["layer"], number, 0, filters=result.filters)
    assert reproduction.command is None
    for name in supplied:
        assert f"# {name}: " in reproduction.call
    names = dict(supplied)
    exec(reproduction.call, names)
    return names["result"]


OBJECTIVES: list[tuple[o.Objective, dict[str, Any]]] = [
    (o.direction("3", VECTOR), {"vector": VECTOR}),
    (o.direction("3", VECTOR, similarity="cosine"), {"vector": VECTOR}),
    (o.channel_weights("3", VECTOR) - 2 * o.direction_neuron("3", -VECTOR, position=(1, 2)), {}),
    (fv.channel("3") + 0.5 * (o.direction("3", VECTOR) - o.l2()), {"vector": VECTOR}),
    (o.interpolate(fv.channel("3", 1), o.direction("3", VECTOR), count=3), {"vector": VECTOR}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "supplied"), OBJECTIVES, ids=lambda value: None)
def test_objectives_that_hold_tensors_name_them(objective: o.Objective, supplied: dict[str, Any], tiny: Model) -> None:
    result = fv.render(tiny, objective, [0, 1], **QUICK)
    supplied = supplied or {"weights": VECTOR, "vector": -VECTOR}
    other = again(result, 1, **supplied, module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


def test_two_tensors_of_one_name_get_two_variables(tiny: Model) -> None:
    result = fv.render(tiny, o.direction("3", VECTOR) - o.direction("5", VECTOR[:6]), **QUICK)
    other = again(result, 0, vector=VECTOR, vector_2=VECTOR[:6], module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


@pytest.mark.slow
def test_activations_and_pictures_are_named(tiny: Model) -> None:
    picture = torch.rand(3, 20, 20)
    kept = fv.activations_of(tiny, ["3"], picture)
    result = fv.render(tiny, o.inversion(kept) - o.departure("5", picture), **QUICK)
    other = again(result, 0, reference=kept, picture=picture, module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


@pytest.mark.slow
def test_an_objective_of_your_own_is_named(tiny: Model) -> None:
    own = o.Objective(lambda a, t: a["3"].mean(), lambda a, t: a["3"].mean(0), ("3",), (), "everything")
    result = fv.render(tiny, own - 0.1 * o.l2(), **QUICK)
    other = again(result, 0, own_objective=own, module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


def test_parts_of_your_own_are_named(tiny: Model) -> None:
    def shift(images: Tensor, draw: Tensor) -> Tensor:
        return images.roll(1, -1)

    parts: dict[str, Any] = {
        "transforms": fv.Transform(lambda key: key, shift),
        "image": fv.pixel(20),
        "optimizer": fv.optimizer.sgd(0.1),
    }
    result = fv.render(tiny, "3", [1], **parts, **QUICK)
    other = again(result, 1, **parts, module=tiny.module)
    torch.testing.assert_close(other.images, result.images)


def test_a_record_without_the_code_of_its_objective_says_so() -> None:
    config = {"model": "texturenet", "objective": "direction('head', <32 numbers>)", "layer": "head", "seed": 0}
    reproduction = reproduce(config, "head", 0, 0)
    assert reproduction.command is None
    compile(reproduction.call, "call", "exec")
    assert "# own_objective: direction('head', <32 numbers>), which is not recorded" in reproduction.call


def test_axes_that_the_user_states_are_recorded() -> None:
    class ChannelsLast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1).contiguous()

    net = nn.Sequential(nn.Conv2d(3, 5, 1), ChannelsLast(), nn.ReLU())
    model = fv.load_model(net, size=5, mean=[0.0] * 3, std=[1.0] * 3)
    result = fv.render(model, "1@hwc", [2], **QUICK)
    assert result.config["layer"] == "1@hwc"
    names: dict[str, Any] = {"module": net}
    exec(reproduce(result.config, result.config["layer"], 2, 0).call, names)
    torch.testing.assert_close(names["result"].images, result.images)
