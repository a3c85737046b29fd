"""Modules that take more than images: which argument is the image, and what the others are."""

import copy
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.models import Model, fingerprint, load_model
from featvis_func.models.inputs import ImageInputs, original
from tests.toys import make_tiny

INPUT: dict[str, Any] = {"size": 12, "mean": [0.0] * 3, "std": [1.0] * 3}
TOKENS = torch.tensor([1, 2, 4])
MASK = torch.linspace(0, 1, 100).reshape(10, 10)


class Captioned(nn.Module):
    """Takes an image, tokens, and a mask; has parameters, buffers and tensors of its own, and behaves by its mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)
            self.embedding = nn.Embedding(5, 4)
            self.out = nn.Conv2d(4, 5, 1)
            self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("shift", torch.full((4,), 0.25))
        self.offset = torch.full((4,), 0.5)

    def forward(self, image: Tensor, tokens: Tensor, *, mask: Tensor | None = None, gain: float = 1.0) -> Tensor:
        x = self.conv(image) * 0 if self.training else self.conv(image)
        bias = self.embedding(tokens).mean(1) * self.scale + self.shift + self.offset
        x = (x + gain * bias[:, :, None, None]).relu()
        return self.out(x if mask is None else x * mask[:, None])


def expected(module: Captioned, images: Tensor) -> Tensor:
    evaluated = copy.deepcopy(module).eval()
    return evaluated(images, TOKENS.expand(len(images), -1), mask=MASK.expand(len(images), -1, -1), gain=2.0)


def fixed(images: Tensor) -> tuple[Any, ...]:
    n = images.shape[0]
    return images, TOKENS.expand(n, -1), {"mask": MASK.expand(n, -1, -1), "gain": 2.0}


FORMS: dict[str, Any] = {
    "tuple": (fv.IMAGE_INPUT, TOKENS, {"mask": MASK, "gain": 2.0}),
    "list": [fv.IMAGE_INPUT, TOKENS, {"mask": MASK, "gain": 2.0}],
    "dict": {"image": fv.IMAGE_INPUT, "tokens": TOKENS, "mask": MASK, "gain": 2.0},
    "mapping": UserDict(image=fv.IMAGE_INPUT, tokens=TOKENS, mask=MASK, gain=2.0),
    "function": fixed,
    "function that returns a dict": lambda x: {"image": x, "tokens": fixed(x)[1], **fixed(x)[2]},
}


def features_of(model: Model, layer: str = "out", **options: Any) -> Any:
    return fv.make_features(model, [layer], precision="float32", **options)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_features_are_those_of_the_module_with_its_inputs(form: str) -> None:
    module = Captioned()
    model = load_model(module, inputs=FORMS[form], **INPUT)
    assert [name for name, _ in model.module.named_modules()] == [name for name, _ in module.named_modules()]
    assert list(model.module.state_dict()) == list(module.state_dict())
    features = features_of(model)
    assert features.exported
    images = torch.rand(3, 3, 12, 12)
    with torch.no_grad():
        for n in (1, 3):
            actual = features.apply(features.weights, images[:n])["out"]
            torch.testing.assert_close(actual, expected(module, images[:n]), rtol=1e-4, atol=1e-5)


def test_the_hook_fallback_takes_inputs_as_well() -> None:
    class Branching(Captioned):
        def forward(self, image: Tensor, tokens: Tensor, **options: Any) -> Tensor:
            return super().forward(image if image.sum() > 0 else image + 0, tokens, **options)

    model = load_model(Branching(), inputs=FORMS["tuple"], **INPUT)
    with pytest.warns(UserWarning, match="Branching runs with a forward hook"):
        features = features_of(model)
    images = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        actual = features.apply(features.weights, images)["out"]
    torch.testing.assert_close(actual, expected(Captioned(), images), rtol=1e-4, atol=1e-5)


def test_the_users_module_stays_as_it_was() -> None:
    module = Captioned().train()
    module.register_forward_hook(lambda *_: None)
    before, hooks = fingerprint(module), dict(module._forward_hooks)
    model = load_model(module, inputs=FORMS["dict"], **INPUT)
    fv.render(model, "out", [0], steps=2)
    assert fingerprint(module) == before
    assert dict(module._forward_hooks) == hooks
    assert module.training
    assert module.conv.training
    assert [*vars(module)] == [*vars(Captioned())]


def test_hooks_of_the_module_that_change_values_run_once() -> None:
    module = Captioned()
    module.register_forward_hook(lambda child, args, output: output.mul(3) if isinstance(child, Captioned) else None)
    module.register_forward_pre_hook(lambda child, args: (args[0] / 2, *args[1:]))
    model = load_model(module, inputs=FORMS["tuple"], **INPUT)
    features = features_of(model, "output")
    images = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        actual = features.apply(features.weights, images)["output"]
        torch.testing.assert_close(actual, 3 * expected(Captioned(), images / 2), rtol=1e-4, atol=1e-5)


def test_inputs_operations_and_the_output_of_the_module_have_names() -> None:
    model = load_model(Captioned(), inputs=FORMS["tuple"], **INPUT)
    names = {layer.name: layer.shape for layer in fv.list_layers(model, all=True)}
    assert {"conv<": (3, 12, 12), "/relu": (4, 10, 10), "output": (5, 10, 10)}.items() <= names.items()
    images = torch.rand(2, 3, 12, 12)
    for name, values in (("<[mask]", MASK.expand(2, 10, 10)), ("<[0]", images)):
        features = features_of(model, name)
        assert torch.equal(features.apply(features.weights, images)[name], values)


def test_layers_that_are_called_in_training_mode_only_are_reached() -> None:
    class Auxiliary(Captioned):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.Conv2d(4, 2, 1)

        def forward(self, image: Tensor, tokens: Tensor, **options: Any) -> Any:  # type: ignore[override]
            x = self.conv(image)
            return (self.auxiliary(x), x) if self.training else x

    with pytest.warns(UserWarning, match="'auxiliary' is called in training mode only"):
        features = features_of(load_model(Auxiliary(), inputs=FORMS["tuple"], **INPUT), "auxiliary")
    assert features.exported


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_modes_copies_and_moves_reach_the_wrapped_module(shift: float) -> None:
    module = Captioned().train()
    wrapper = load_model(module, inputs=FORMS["tuple"], **INPUT).module
    copied = copy.deepcopy(wrapper).eval()
    assert isinstance(copied, ImageInputs)
    inner = original(copied)
    assert isinstance(inner, Captioned)
    assert inner is not module
    assert not inner.training
    assert module.training
    assert inner.conv is copied.conv
    copied = copied.to(torch.float64)
    assert {inner.shift.dtype, inner.scale.dtype, inner.conv.weight.dtype} == {torch.float64}  # type: ignore[union-attr]
    images = torch.rand(2, 3, 12, 12) + shift
    inner.offset = inner.offset.double()
    with torch.no_grad():
        torch.testing.assert_close(copied(images.double()).float(), expected(module, images), rtol=1e-4, atol=1e-5)
    meta = copy.deepcopy(wrapper).to("meta")
    assert all(getattr(meta, name).is_meta for name in ("input_0", "input_1", "shift"))
    assert not any(getattr(wrapper, name).is_meta for name in ("input_0", "input_1", "shift"))


def test_fixed_tensors_are_safe_from_a_module_that_writes_to_its_inputs() -> None:
    class Writes(nn.Module):
        def forward(self, image: Tensor, other: Tensor) -> Tensor:
            return image.mul(1) + other.add_(1)

    other = torch.zeros(3, 4, 4)
    wrapper = ImageInputs(Writes(), (fv.IMAGE_INPUT, other))
    for n in (1, 2, 1):
        assert torch.equal(wrapper(torch.zeros(n, 3, 4, 4)), torch.ones(n, 3, 4, 4))
    assert not other.any()


class Pair(NamedTuple):
    first: Any
    second: Any


class Echo(nn.Module):
    """Returns its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


IMAGES = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [
        (fv.IMAGE_INPUT, (IMAGES,), {}),
        ((fv.IMAGE_INPUT,), (IMAGES,), {}),
        ((fv.IMAGE_INPUT, fv.IMAGE_INPUT), (IMAGES, IMAGES), {}),
        ({"x": fv.IMAGE_INPUT, "n": 3}, (), {"x": IMAGES, "n": 3}),
        (({"x": fv.IMAGE_INPUT},), ({"x": IMAGES},), {}),
        ((1, {"x": fv.IMAGE_INPUT}), (1,), {"x": IMAGES}),
        ((1, {"x": fv.IMAGE_INPUT}, {}), (1, {"x": IMAGES}), {}),
        (([fv.IMAGE_INPUT, (None, "a")],), ([IMAGES, (None, "a")],), {}),
        ((Pair(fv.IMAGE_INPUT, 2),), (Pair(IMAGES, 2),), {}),
        ((OrderedDict(x=fv.IMAGE_INPUT), {"y": True}), ({"x": IMAGES},), {"y": True}),
        (lambda x: (x, 2), (IMAGES, 2), {}),
        (lambda x: {"x": x}, (), {"x": IMAGES}),
        (lambda x: x, (IMAGES,), {}),
        (lambda x: [x, x], ([IMAGES, IMAGES],), {}),
        (lambda x: ((x, x),), ((IMAGES, IMAGES),), {}),
    ],
)
def test_forms_of_inputs(inputs: Any, args: Any, kwargs: Any) -> None:
    actual = ImageInputs(Echo(), inputs)(IMAGES)
    assert str(actual) == str((args, kwargs))
    assert [type(value) for value in actual[0]] == [type(value) for value in args]


def test_tensors_are_repeated_along_a_new_first_axis() -> None:
    (actual, *_), _ = ImageInputs(Echo(), ([TOKENS, torch.tensor(0.5)], fv.IMAGE_INPUT))(IMAGES)
    assert torch.equal(actual[0], torch.stack([TOKENS, TOKENS]))
    assert torch.equal(actual[1], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((fv.IMAGE_INPUT,), r"inputs= does not fit Captioned\.forward\(image, tokens, \*, mask=None, .*'tokens'"),
        ((fv.IMAGE_INPUT, 1, 2), r"inputs= does not fit Captioned\.forward.*: too many positional arguments"),
        ({"image": fv.IMAGE_INPUT, "tokens": 1, "maks": 2}, r"got an unexpected keyword argument 'maks'"),
        ((TOKENS, TOKENS), r"inputs= does not say where the images go: put fv\.IMAGE_INPUT there, got a tuple"),
        (7, r"inputs= must be a tuple of arguments, a dict .*, or a function .*, got 7"),
        (TOKENS, r"inputs= must be .* got a Tensor"),
    ],
)
def test_inputs_that_do_not_fit_raise(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(Captioned(), inputs=inputs, **INPUT)
    assert "\n" not in str(raised.value)


class ByKeyword(nn.Module):
    def forward(self, *, pixels: Tensor) -> Tensor:
        return pixels


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Captioned(),
            r"Captioned\.forward\(image, tokens, \*, mask=None, gain=1\.0\) cannot be called with images alone",
        ),
        (ByKeyword(), r"ByKeyword\.forward\(\*, pixels\) cannot be called with images alone .*inputs=\{'pixels': fv"),
    ],
)
def test_modules_that_need_inputs_ask_for_them(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(module, **INPUT)
    assert "inputs=(fv.IMAGE_INPUT, ...)" in str(raised.value)
    assert load_model(module, inputs=lambda x: x, **INPUT).channels == 3  # checked when it is called


def test_a_function_may_hold_channels_fixed() -> None:
    """The rendered image has the channels that are left."""
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1))
    inputs = lambda x: torch.cat([x, torch.full_like(x[:, :2], 0.5)], 1)  # noqa: E731
    model = load_model(module, inputs=inputs, size=9, mean=[0.2, 0.3], std=[1, 1])
    assert model.channels == 2
    assert fv.render(model, "1", [0], steps=2).images.shape == (1, 2, 9, 9)
    depth = load_model(module, size=9, inputs=lambda x: torch.cat([x, x[:, :1]], 1), value_range=(0, 1))
    assert (depth.channels, depth.assumed) == (3, ())  # found, as 3 is tried last


@pytest.mark.slow
def test_layers_of_a_module_inside_a_dict_of_inputs_render_bit_for_bit_like_the_module_alone() -> None:
    class Nested(nn.Sequential):
        def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
            return super().forward(batch["image"])

    plain = make_tiny()
    nested = Nested(OrderedDict(plain.named_children())).eval()
    given: dict[str, Any] = {"size": 20, "mean": [0.5] * 3, "std": [0.5] * 3}
    model = load_model(nested, inputs=({"image": fv.IMAGE_INPUT},), **given)
    images = [fv.render(m, "5", [1], steps=2).images for m in (load_model(plain, **given), model)]
    assert torch.equal(*images)


def test_a_preprocessing_module_may_be_the_function() -> None:
    module = make_tiny()
    pool = nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.Dropout()).train()
    model = load_model(module, inputs=pool, size=40, value_range=(0, 1))
    assert len(module) == 10
    assert [name for name, _ in model.module.named_children()] == [name for name, _ in module.named_children()]
    features = features_of(model, "5")
    assert features.exported
    assert pool.training
    images = torch.rand(2, 3, 40, 40)
    reference = features_of(load_model(module, size=20, value_range=(0, 1)), "5")
    with torch.no_grad():
        actual = features.apply(features.weights, images)["5"]
        halved = copy.deepcopy(pool).eval()(images)
        torch.testing.assert_close(actual, reference.apply(reference.weights, halved)["5"], rtol=1e-4, atol=1e-5)


def test_inputs_of_a_model_replace_those_it_has() -> None:
    module = Captioned()
    first = load_model(module, inputs=lambda x: (x, TOKENS.expand(len(x), -1)), **INPUT)
    second = load_model(first, inputs=FORMS["tuple"])
    assert original(second.module) is module
    images = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(second.module.eval()(images), expected(module, images))


@pytest.mark.parametrize("spec", ["texturenet", "torchvision:squeezenet1_1@none", "timm:test_resnet@none"])
def test_named_models_take_inputs(spec: str) -> None:
    if spec.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    plain = load_model(spec)
    twice = load_model(spec, inputs=lambda x: 2 * x)
    images = torch.rand(2, 3, *plain.size)
    with torch.no_grad():
        assert torch.equal(twice.module(images), plain.module(2 * images))
    assert (twice.name, twice.mean, twice.size) == (plain.name, plain.mean, plain.size)


def test_fingerprints_cover_the_fixed_inputs() -> None:
    def of(inputs: Any) -> str:
        return fingerprint(load_model(Captioned(), inputs=inputs, **INPUT).module)

    assert of(FORMS["tuple"]) == of((fv.IMAGE_INPUT, TOKENS.clone(), {"mask": MASK.clone(), "gain": 2.0}))
    assert of(FORMS["tuple"]) != of((fv.IMAGE_INPUT, TOKENS + 1, FORMS["tuple"][2]))
    assert of(FORMS["tuple"]) != of((fv.IMAGE_INPUT, TOKENS, {"mask": MASK, "gain": 3.0}))
    changed = Captioned()
    changed.offset = changed.offset + 1
    other = fingerprint(load_model(changed, inputs=FORMS["tuple"], **INPUT).module)
    assert of(FORMS["tuple"]) != other


def test_the_marker_survives_copies() -> None:
    assert copy.deepcopy(fv.IMAGE_INPUT) is fv.IMAGE_INPUT
    assert repr((fv.IMAGE_INPUT,)) == "(IMAGE_INPUT,)"


# --- optical flow of torchvision ------------------------------------------------------------------------------------


def small_flow(load: Callable[[], Model]) -> tuple[Model, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return load(), [str(w.message) for w in caught if w.filename == __file__]


@pytest.mark.slow
def test_optical_flow_compares_an_image_with_itself_unless_inputs_say_otherwise() -> None:
    model, messages = small_flow(lambda: load_model("torchvision:raft_small@none", size=128))
    assert ["takes 2 images" in message and "inputs=(fv.IMAGE_INPUT, second)" in message for message in messages] == [
        True
    ]
    assert (model.mean, model.std, model.assumed) == ((0.5,) * 3, (0.5,) * 3, ("inputs",))
    images, second = torch.rand(2, 1, 3, 128, 128) * 2 - 1
    raft = original(model.module)
    with torch.no_grad():
        assert torch.equal(model.module(images)[-1], raft(images, images)[-1])
        spec, inputs = "torchvision:raft_small@none", (fv.IMAGE_INPUT, second[0])
        stated, messages = small_flow(lambda: load_model(spec, size=128, inputs=inputs))
        assert torch.equal(stated.module(images)[-1], original(stated.module)(images, second)[-1])
    assert (stated.assumed, messages) == ((), [])
