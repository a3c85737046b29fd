"""Modules that torch.func or torch.export cannot take, in the form in which their user has them."""

import threading
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils.checkpoint
import torchvision.ops
from torch import Tensor, nn

from featvis_func.backbone.features import make_features
from featvis_func.backbone.listing import list_layers
from featvis_func.models import Model, load_model
from tests.plain_ascent import history, plain_history

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (12, 14)
FALLBACK = "runs with a forward hook"


def as_model(module: nn.Module) -> Model:
    return load_model(module, mean=(0, 0, 0), std=(1, 1, 1), size=SIZE)


class Body(nn.Module):
    """A convolution, an operation of a subclass, and a second convolution."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Conv2d(3, 4, 3)
            self.last = nn.Conv2d(4, 5, 3)
        self.eval()

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self.first(x)))


class _Clipped(torch.autograd.Function):
    """An old-style function, whose gradient is not that of its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-0.3, 0.3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 0.5 * grad * ctx.saved_tensors[0].cos()


class OldStyle(Body):
    def between(self, x: Tensor) -> Tensor:
        return _Clipped.apply(x)  # type: ignore[return-value]


class Deformed(Body):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(4, 18, 3)
        self.last = torchvision.ops.DeformConv2d(4, 5, 3)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x, self.offsets(x))


class Regions(Body):
    def between(self, x: Tensor) -> Tensor:
        boxes = x.new_tensor([[1.0, 2.0, 8.0, 9.0]])
        return torchvision.ops.roi_align(x, [boxes] * len(x), 6)


@torch.library.custom_op("featvis_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


cube.register_fake(torch.empty_like)
cube.register_autograd(
    lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class CustomOperator(Body):
    def between(self, x: Tensor) -> Tensor:
        return cube(x)


class StraightThrough(Body):
    def between(self, x: Tensor) -> Tensor:
        return x + ((50 * x).round() / 50 - x).detach()


class Checkpointed(Body):
    """Reentrant checkpoints around both convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=True)  # type: ignore[assignment]
        return torch.utils.checkpoint.checkpoint(lambda y: self.last(y.tanh()), x, use_reentrant=True)  # type: ignore


class _Recomputed(torch.autograd.Function):
    """A checkpoint of one's own, whose backward pass calls ``backward``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        if not torch.autograd._is_checkpoint_valid():  # type: ignore[attr-defined]
            raise RuntimeError("only in a plain backward pass")
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            x.sin().backward(grad)
        assert x.grad is not None
        return x.grad


class OwnCheckpoint(Body):
    def between(self, x: Tensor) -> Tensor:
        return _Recomputed.apply(x)  # type: ignore[return-value]


class ThroughNumpy(Body):
    def between(self, x: Tensor) -> Tensor:
        peaks = x.detach().numpy().max(axis=(1, 2, 3))
        return x * torch.from_numpy(peaks)[:, None, None, None]


KINDS = [OldStyle, Deformed, Regions, CustomOperator, StraightThrough, Checkpointed, OwnCheckpoint, ThroughNumpy]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_module_that_trains_is_rendered_as_by_a_plain_ascent(kind: type[Body]) -> None:
    torch.manual_seed(0)
    module = kind()
    if kind is Checkpointed:  # a hook inside the checkpoint sees no gradient
        plain = Body()
        plain.between = torch.tanh  # type: ignore[method-assign]
        expected = plain_history(plain, "last", [4, 0], size=SIZE)
    else:
        own = kind is OwnCheckpoint
        expected = plain_history_by_backward() if own else plain_history(module, "last", [4, 0], size=SIZE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{FALLBACK}")
        actual = history(as_model(module), "last", [4, 0], size=SIZE)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert (actual[-1] > actual[0]).all()


def plain_history_by_backward() -> Tensor:
    """The values are those of a sine; only the way to its gradient differs."""
    plain = Body()
    plain.between = torch.sin  # type: ignore[method-assign]
    return plain_history(plain, "last", [4, 0], size=SIZE)


def test_functions_of_the_fallback_work_under_torch_func() -> None:
    module = OldStyle()
    with pytest.warns(UserWarning, match=FALLBACK):
        features = make_features(as_model(module), ["last"])
    assert not features.exported
    images = torch.rand(2, 3, 3, *SIZE)

    def score(images: Tensor) -> Tensor:
        return features.apply(features.weights, images)["last"].square().sum()

    def eagerly(images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        return torch.autograd.grad(module(images).square().sum(), images)[0]

    expected = torch.stack([eagerly(batch) for batch in images])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(score))(images), expected)
    value, pull = torch.func.vjp(score, images[0])  # type: ignore[misc]
    torch.testing.assert_close(value, module(images[0]).square().sum())
    torch.testing.assert_close(pull(torch.tensor(2.0))[0], 2 * expected[0])
    jacobian = torch.func.jacrev(lambda x: features.apply(features.weights, x)["last"].mean((0, 2, 3)))(images[0])
    assert jacobian.shape == (5, 3, 3, *SIZE)
    torch.testing.assert_close(
        jacobian[3], torch.func.grad(lambda x: features.apply(features.weights, x)["last"][:, 3].mean())(images[0])
    )
    with pytest.raises(RuntimeError, match="differentiable with respect to the images only"):
        torch.func.grad(lambda weights: features.apply(weights, images[0])["last"].sum())(features.weights)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.func.grad(lambda x: torch.func.grad(score)(x).square().sum())(images[0])
    scaled = {name: 2 * tensor for name, tensor in features.weights.items()}
    again = features.apply(scaled, images[0])["last"]
    assert not torch.allclose(again, features.apply(features.weights, images[0])["last"])


def test_parameters_outside_of_the_module_get_no_gradient() -> None:
    """Those of a module in a closure, as of a spliced autoencoder."""
    outside = nn.Conv2d(4, 4, 1)
    module = OldStyle()
    module.between = lambda x: _Clipped.apply(outside(x))  # type: ignore
    with pytest.warns(UserWarning, match=FALLBACK):
        actual = history(as_model(module), "last", [1], size=SIZE)
    torch.testing.assert_close(actual, plain_history(module, "last", [1], size=SIZE), atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in (*outside.parameters(), *module.parameters()))


def test_module_without_any_gradient_is_an_error() -> None:
    class NoGradient(Body):
        def between(self, x: Tensor) -> Tensor:
            return _Fails.apply(x)  # type: ignore[return-value]

    class _Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            raise NotImplementedError("this rounding has no gradient")

    with pytest.raises(ValueError, match=r"NoGradient cannot be differentiated: this rounding has no gradient"):
        make_features(as_model(NoGradient()), ["last"])


# --- what a module holds --------------------------------------------------------------------------------------------


class Log:
    """An object that cannot be copied, which holds tensors of a training step."""

    def __init__(self, activation: Tensor) -> None:
        self.lock = threading.Lock()
        self.seen = {"activation": activation}


def attributes() -> dict[str, Callable[[Body], object]]:
    def activation(module: Body) -> Tensor:
        return module.first(torch.ones(1, 3, 8, 8))

    return {
        "lock": lambda module: threading.Lock(),
        "file": lambda module: open(__file__),
        "generator": lambda module: (i for i in range(3)),
        "random generator": lambda module: torch.Generator(),
        "local": lambda module: threading.local(),
        "scripted": lambda module: torch.jit.trace(torch.sin, torch.ones(2)),
        "list": lambda module: [activation(module), {"again": (activation(module),)}],
        "activation": activation,
        "object": lambda module: Log(activation(module)),
        "itself": lambda module: {"owner": [module]},
        "module": lambda module: types,
        "thread": lambda module: threading.Thread(),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", attributes())
def test_modules_hold_what_cannot_be_copied(name: str) -> None:
    module, plain = Body(), Body()
    held = attributes()[name](module)
    module.extra = held  # type: ignore[assignment]
    module.first.extra = {"nested": held}  # type: ignore[assignment]
    features = make_features(as_model(module), ["last"])
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features.apply(features.weights, images)["last"], plain(images))
    assert module.extra is held
    if hasattr(held, "close"):
        held.close()  # type: ignore[attr-defined]


def test_attribute_that_cannot_be_copied_is_named() -> None:
    class Refuses(Tensor):
        def clone(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no copies")

        def detach(self) -> Any:
            return self

    module = Body()
    module.first.table = {"x": torch.ones(2).as_subclass(Refuses)}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"attribute 'first.table' of Body cannot be copied: no copies"):
        make_features(as_model(module), ["last"])


def test_methods_and_objects_of_the_copy_refer_to_the_copy() -> None:
    class Holder:
        def __init__(self, conv: nn.Module) -> None:
            self.conv = conv

    module = Body()
    module.holder = Holder(module.first)  # type: ignore[assignment]
    module.call = module.last.forward  # type: ignore[assignment]
    module.forward = types.MethodType(lambda self, x: self.last(self.holder.conv(x)), module)  # type: ignore
    features = make_features(as_model(module), ["first", "last"])
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features.apply(features.weights, images)["last"], Body()(images))


@pytest.mark.slow
def test_kept_features_keep_their_values_when_the_module_trains_on() -> None:
    """Also 1 x 1 kernels, biases, and tensors that are no parameters."""

    class Everything(Body):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Conv2d(5, 5, 1)
            self.norm = nn.BatchNorm2d(5).eval()
            self.scale = torch.full((), 2.0)
            self.register_buffer("shift", torch.full((), 0.25))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.narrow(super().forward(x))) * self.scale + self.shift

    for wrap in (lambda x: x, lambda x: _Clipped.apply(x)):
        module = Everything()
        module.between = wrap  # type: ignore
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{FALLBACK}")
            features = make_features(as_model(module), ["output"])
        images = torch.rand(2, 3, *SIZE)
        before = features.apply(features.weights, images)["output"]
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers(), module.scale):
                if tensor.is_floating_point():
                    tensor.add_(1.0)
        assert torch.equal(features.apply(features.weights, images)["output"], before)
        assert not torch.allclose(before, module(images))


# --- the number of calls --------------------------------------------------------------------------------------------


class PerImage(Body):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.last(self.first(image[None])) for image in x])


class Branch(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x) if x.mean() < 0.5 else x[:, :1]


class Twice(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x) + (self.last(-x) if x.mean() > 0.2 else 0)


@pytest.mark.parametrize("kind", [PerImage, Branch, Twice])
def test_layers_of_a_varying_number_of_calls_are_errors_when_features_are_made(kind: type[Body]) -> None:
    with pytest.raises(
        ValueError, match=r"'last' is called \d times? in one forward pass and \d in another: the number"
    ):
        make_features(as_model(kind()), ["last"])


def test_layers_beside_those_of_a_varying_number_of_calls_are_rendered() -> None:
    module = Branch()
    with pytest.warns(UserWarning, match="depends on values, such as by a branch"):
        actual = history(as_model(module), "first", [2], size=SIZE)
    torch.testing.assert_close(actual, plain_history(module, "first", [2], size=SIZE), atol=1e-5, rtol=1e-4)


# --- hooks of the user ----------------------------------------------------------------------------------------------


class Adds(nn.Module):
    """A module used as a hook, as a spliced autoencoder is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.1, 2, 4)[:, None, None])

    def forward(self, child: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.scale


def ablate(child: nn.Module, args: Any, output: Tensor) -> Tensor:
    output = output.clone()
    output[:, 1] = 0
    return output


def write(child: nn.Module, args: Any, output: Tensor) -> None:
    output.data.mul_(0.5)
    output.add_(0.1)


def set_weight(child: nn.Module, args: Any) -> None:
    child.weight = nn.Parameter(child.kernel * 0.5)  # type: ignore[operator]


HOOKS: dict[str, Callable[[Body], object]] = {
    "replaces an output": lambda m: m.first.register_forward_hook(ablate),
    "writes to an output": lambda m: m.first.register_forward_hook(write),
    "is a module": lambda m: m.first.register_forward_hook(Adds()),
    "prepares the images": lambda m: m.register_forward_pre_hook(lambda child, args: (2 * args[0] - 1,)),
    "takes keywords": lambda m: m.last.register_forward_pre_hook(
        lambda child, args, kwargs: ((args[0].flip(1),), kwargs), with_kwargs=True
    ),
    "is a method": lambda m: m.first.register_forward_hook(m.hook),  # type: ignore
    "changes gradients": lambda m: m.first.register_full_backward_hook(lambda child, before, after: (before[0] * 3,)),
    "of the layer itself": lambda m: m.last.register_forward_hook(lambda child, args, output: output.square()),  # type: ignore
}


class WithMethod(Body):
    def hook(self, child: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.first.bias.sum()  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_values_are_kept(name: str) -> None:
    module = WithMethod()
    without = plain_history(module, "last", [3, 1], size=SIZE)
    HOOKS[name](module)
    expected = plain_history(module, "last", [3, 1], size=SIZE)
    assert not torch.allclose(without, expected, atol=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{FALLBACK}")
        actual = history(as_model(module), "last", [3, 1], size=SIZE)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_hook_that_sets_a_weight_is_kept() -> None:
    module = Body()
    module.last.kernel = module.last.weight.detach().clone()
    module.last.register_forward_pre_hook(set_weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{FALLBACK}")
        actual = history(as_model(module), "last", [2], size=SIZE)
    torch.testing.assert_close(actual, plain_history(module, "last", [2], size=SIZE), atol=1e-5, rtol=1e-4)


def test_hooks_that_only_look_run_while_features_are_made_and_never_again() -> None:
    module = Body()
    seen: list[Any] = []
    module.first.register_forward_hook(lambda child, args, output: seen.append(output))
    module.last.register_full_backward_hook(lambda child, before, after: seen.append(after[0]))
    module.first.register_forward_hook(lambda child, args, output: output)
    features = make_features(as_model(module), ["last"])
    assert features.exported
    count = len(seen)
    images = torch.rand(2, 3, *SIZE, requires_grad=True)
    features.apply(features.weights, images)["last"].sum().backward()
    assert len(seen) == count


# --- compiled parts and wrappers ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_parts_are_rendered_by_either_name() -> None:
    plain = nn.Sequential(Body(), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    module = nn.Sequential(torch.compile(plain[0]), torch.compile(plain[1]), plain[2])  # type: ignore[arg-type]
    wanted = plain_history(plain, "0.last", [3], size=SIZE)
    copied = next(name for name, _ in module.named_modules() if name.endswith("last"))
    assert "_orig_mod" in copied
    for name in (copied, "0.last", "last", f"module.{copied}", f"_orig_mod.{copied}"):
        actual = make_features(as_model(module), [name])
        assert actual.paths[name] == "0.last"
    torch.testing.assert_close(history(as_model(module), copied, [3], size=SIZE), wanted, atol=1e-5, rtol=1e-4)


def test_models_compiled_in_place_and_parallel_parts() -> None:
    module = nn.Sequential(nn.DataParallel(Body()), nn.ReLU())
    module[1].compile()
    module.compile()
    expected = plain_history(Body(), "last", [0], size=SIZE)
    actual = history(as_model(module), "0.module.last", [0], size=SIZE)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_compiled_functions_of_a_module() -> None:
    module = Body()
    module.between = torch.compile(torch.tanh)  # type: ignore[method-assign]
    module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
    plain = Body()
    plain.between = torch.tanh  # type: ignore[method-assign]
    torch.testing.assert_close(
        history(as_model(module), "last", [0], size=SIZE),
        plain_history(plain, "last", [0], size=SIZE),
        atol=1e-5,
        rtol=1e-4,
    )


# --- tensors without a name of their own ----------------------------------------------------------------------------


class Pair(NamedTuple):
    logits: Tensor
    rest: list[Tensor]


@dataclass
class Answer:
    scores: Tensor
    name: str


class Reused(Body):
    """One activation called three times, functional operations, and an output of several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.tail = nn.Conv2d(5, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.relu(self.first(x) - 0.1)
        y = self.relu(self.last(x) + 0.05)
        z = torch.tanh(y) + self.tail(self.relu(y - 0.02))
        return {"pair": Pair(z.mean((2, 3)), [y]), "answer": Answer(torch.sigmoid(z), "x")}


def compute(module: Reused, images: Tensor) -> dict[str, Tensor]:
    """The tensors of the forward pass, by the names of layers."""
    a = module.first(images) - 0.1
    x = a.relu()
    b = module.last(x) + 0.05
    y = b.relu()
    third = (y - 0.02).relu()
    z = y.tanh() + module.tail(third)
    return {
        "relu#1": x, "relu#2": y, "relu": third, "relu#3": third, "relu<": y - 0.02, "relu#2<": b, "tail<": third,
        "last<": x, "/tanh": y.tanh(), "/sub#1": a, "/sub": y - 0.02, "/add#2": z, "/add": z,
        "[answer][scores]": z.sigmoid(), "output[pair][logits]": z.mean((2, 3)), "output[pair][0]": z.mean((2, 3)),
        "output[pair][1][0]": y,
    }  # fmt: skip


def test_every_tensor_of_a_forward_pass_has_a_name() -> None:
    module = Reused()
    images = torch.rand(2, 3, *SIZE)
    names = list(compute(module, images))
    features = make_features(as_model(module), names)
    assert features.exported

    def score(outputs: dict[str, Tensor]) -> Tensor:
        return torch.stack([outputs[name].square().mean() for name in names]).sum()

    actual, expected = features.apply(features.weights, images), compute(module, images)
    assert {name: tuple(value.shape[1:]) for name, value in expected.items()} == features.shapes
    for name in names:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
    gradient = torch.func.grad(lambda x: score(features.apply(features.weights, x)))(images)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: score(compute(module, x)))(images))


class KeepsSecond(Reused):
    """As before, for the hook fallback."""

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return super().forward(_Clipped.apply(x))  # type: ignore[arg-type]


@pytest.mark.slow
def test_calls_inputs_and_outputs_in_the_fallback() -> None:
    module = KeepsSecond()
    names = [name for name in compute(module, torch.rand(1, 3, *SIZE)) if "/" not in name]
    with pytest.warns(UserWarning, match=FALLBACK):
        features = make_features(as_model(module), names)
    images = torch.rand(2, 3, *SIZE)
    expected = compute(module, images.clamp(-0.3, 0.3))
    actual = features.apply(features.weights, images)
    for name in names:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
    with pytest.raises(ValueError, match=r"'/tanh' is an operation inside of a module, which can only be reached in a"):
        make_features(as_model(module), ["/tanh"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("relu#4", r"layer 'relu#4': a forward pass calls 'relu' 3 times"),
        ("/tanhh", r"the forward pass has no operation '/tanhh'; did you mean '/tanh'\?"),
        ("/sub#3", r"the forward pass has no operation '/sub#3'; did you mean '/sub#2' or '/sub#1'\?"),
        ("relu/add", r"the forward pass has no operation 'relu/add'; (did you mean|there are)"),
        ("output", r"layer 'output' gives a dict instead of a tensor, .*choose one of 'output\[pair\]\[0\]'"),
        ("output[pair][2]", r"layer 'output\[pair\]\[2\]' gives no tensor: 'output' is a dict; choose one of"),
        ("first[0]", r"layer 'first\[0\]' does not exist: 'first' gives a single tensor; choose one of 'first'"),
        ("nothing#2", r"no layer 'nothing'"),
        ("relu#0", r"no layer 'relu#0'"),
    ],
)
def test_names_of_tensors_that_do_not_exist_are_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_features(as_model(Reused()), [name])


def test_inputs_by_number_and_keyword() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.mix = Mix()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.mix(y, 2, other=y + 1)

    class Mix(nn.Module):
        def forward(self, x: Tensor, factor: int, *, other: Tensor) -> Tensor:
            return factor * x * other

    module = Attends()
    features = make_features(as_model(module), ["mix<[0]", "mix<[other]"])
    images = torch.rand(2, 3, *SIZE)
    actual = features.apply(features.weights, images)
    torch.testing.assert_close(actual["mix<[0]"], module.conv(images))
    torch.testing.assert_close(actual["mix<[other]"], module.conv(images) + 1)
    with pytest.raises(ValueError, match=r"takes a dict instead of a tensor, .*'mix<\[0\]', 'mix<\[other\]'"):
        make_features(as_model(module), ["mix<"])


def test_heads_that_run_in_training_mode_only() -> None:
    class Auxiliary(Body):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return (self.last(x), self.head(x)) if self.training else self.last(x)

    module = Auxiliary().eval()
    with pytest.warns(UserWarning, match=r"layer 'head' is called in training mode only: Auxiliary itself"):
        features = make_features(as_model(module), ["head"])
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features.apply(features.weights, images)["head"], module.head(module.first(images)))
    assert not module.training


# --- maps of other ranks --------------------------------------------------------------------------------------------


def test_maps_of_videos_and_signals() -> None:
    video = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Flatten(2), nn.Flatten()).eval()
    model = Model(video, "video", (0.0,) * 3, (1.0,) * 3, (5, 12, 14))
    features = make_features(model, ["0", "1", "output"])
    assert features.shapes == {"0": (4, 3, 10, 12), "1": (4, 3, 10, 12), "output": (1440,)}
    signal = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(4)).eval()
    model = Model(signal, "signal", (0.0,) * 2, (1.0,) * 2, (20,))
    features = make_features(model, ["0", "1", "2"])
    assert features.shapes == {"0": (18, 6), "1": (18, 6), "2": (4, 6)}
    signals = torch.rand(3, 2, 20)
    torch.testing.assert_close(features.apply(features.weights, signals)["1"], signal[:2](signals).transpose(1, 2))


def test_videos_with_channels_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 6, 2, stride=2)
            self.norm = nn.LayerNorm(6)
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.conv(x).permute(0, 2, 3, 4, 1)))

    module = Last().eval()
    model = Model(module, "video", (0.0,) * 3, (1.0,) * 3, (4, 12, 20))
    features = make_features(model, ["conv", "norm", "act"])
    assert features.shapes == dict.fromkeys(("conv", "norm", "act"), (6, 2, 6, 10))
    videos = torch.rand(2, 3, 4, 12, 20)
    actual = features.apply(features.weights, videos)["act"]
    torch.testing.assert_close(actual, module(videos).permute(0, 4, 1, 2, 3))


@pytest.mark.slow
def test_list_layers_lists_every_tensor_that_has_a_name() -> None:
    module = Reused()
    listed = {layer.name: layer for layer in list_layers(as_model(module), all=True)}
    names = [name for name in compute(module, torch.rand(1, 3, *SIZE)) if name not in ("/add", "/sub", "relu")]
    renamed = {"output[pair][logits]": "output[pair][0]", "[answer][scores]": "output[answer][scores]"}
    features = make_features(as_model(module), list(listed))
    for name in names:
        path = renamed.get(name, name)
        assert listed[path].shape == features.shapes[path]
        assert listed[path].filters == features.shapes[path][0]
    assert {layer.name for layer in list_layers(as_model(module))} == {"first", "last", "relu", "tail"}


def test_list_layers_of_a_model_that_cannot_be_exported() -> None:
    with pytest.warns(UserWarning, match="operations inside of the modules of Branch are not listed, .* by a branch"):
        listed = [layer.name for layer in list_layers(as_model(Branch()), all=True)]
    assert listed == ["first", "first<", "last", "last<", "output"]


@pytest.mark.slow
def test_layer_names_with_colons() -> None:
    module = Body()
    named = nn.Sequential(OrderedDict({"a:1": module.first, "b:x": module.last}))
    plain = plain_history(named, "b:x", [2], size=SIZE)
    for objective, filters in (("b:x", [2]), ("b:x:2", None), (":x", [2]), (":x:2-2", None)):
        result = history(as_model(named), objective, filters, size=SIZE)  # type: ignore[arg-type]
        torch.testing.assert_close(result, plain, atol=1e-5, rtol=1e-4)
    assert history(as_model(named), "a:1", [3, 0], size=SIZE).shape[1] == 2
    with pytest.raises(ValueError, match="filters 'y' must be numbers and ranges"):
        history(as_model(named), "b:y", None, size=SIZE)  # type: ignore[arg-type]
