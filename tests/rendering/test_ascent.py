"""The parts of a rendering, composed by hand: ``make_ascent``, ``run`` and ``compile_step``."""

import pytest
import torch
from torch import Tensor

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func import random
from featvis_func.engine.run import run
from featvis_func.engine.step import compile_step, make_ascent
from featvis_func.models import Model
from featvis_func.rendering.optimizers import default_optimizer
from featvis_func.tree import tree_map
from featvis_func.types import Optimizer, State
from tests.rendering.parts import Parts, equal_trees, parts_of
from tests.toys import TINY_SIZE, load_toy, make_tiny

# A warning of Inductor about any graph with a Fourier transform.
complex_numbers = pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")


@pytest.fixture(scope="module")
def parts() -> Parts:
    """Shared by all tests of this module, since a step changes none of its parts."""
    return parts_of(load_toy(make_tiny(), size=TINY_SIZE), "5", optimizer=default_optimizer(4, drift=1e-3))


def test_gradient_of_the_sum_is_each_filters_own(tiny: Model) -> None:
    """With gradients as updates, one step shows the gradient, which equals that of a filter alone and the exact one."""
    plain = Optimizer(lambda params, key: (), lambda grads, state, params: (grads, state))
    parts = parts_of(tiny, "5", optimizer=plain, transform="none")
    state, target = parts.start([0, 3, 5])
    after, info = parts.step(parts.features.weights, state, target)
    gradients = after.params - state.params
    for i, number in enumerate([0, 3, 5]):
        alone, own_target = parts.start([number])
        moved, _ = parts.step(parts.features.weights, alone, own_target)
        torch.testing.assert_close(moved.params[0] - alone.params[0], gradients[i], rtol=1e-3, atol=1e-6)

        def score(params: Tensor, number: int = number) -> Tensor:
            image = parts.transform.apply(parts.image.decode(params), parts.transform.draw(random.key(0)))
            return parts.features.apply(parts.features.weights, image[None])["5"][0, number].mean()

        exact = torch.func.grad(score)(state.params[i])
        torch.testing.assert_close(gradients[i], exact, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(info.grad_norm[i], exact.norm(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(info.score[i], score(state.params[i]), rtol=1e-4, atol=1e-6)


def test_filter_keeps_its_state_while_it_is_not_finite(parts: Parts) -> None:
    state, target = parts.start([0, 1])
    state = state._replace(best=state.best._replace(score=torch.tensor([-torch.inf, 1e9])))
    weights = {**parts.features.weights}
    after, info = parts.step(weights, state, target)
    assert after.best.step.tolist() == [0, -1]
    assert after.best.score[1] == 1e9
    assert info.finite.tolist() == [True, True]
    nan_weights = {name: value * torch.nan for name, value in weights.items()}
    kept, info = parts.step(nan_weights, state, target)
    assert info.finite.tolist() == [False, False]
    assert equal_trees((kept.params, kept.opt, kept.best), (state.params, state.opt, state.best))
    assert kept.step.tolist() == [1, 1]


def test_features_must_have_the_layers_of_the_objective(parts: Parts) -> None:
    with pytest.raises(ValueError, match=r"the features lack layer '3' of the objective; they have \['5'\]"):
        make_ascent(parts.features, parts.image, parts.transform, objectives.channel("3"), parts.optimizer)


def test_run_reports_each_step(parts: Parts) -> None:
    state, target = parts.start([1, 4])
    reports: list[fv.Info] = []
    last, infos = run(parts.step, parts.features.weights, state, target, steps=3, callback=reports.append)
    assert len(reports) == 3
    assert all(torch.equal(infos.score[i], info.score) for i, info in enumerate(reports))
    assert {column.shape for column in infos} == {(3, 2)}
    assert last.step.tolist() == [3, 3]
    assert torch.equal(last.best.score, infos.score.max(0).values)
    assert torch.equal(last.key, state.key)


def test_run_in_two_parts_equals_one_run(parts: Parts) -> None:
    weights, (state, target) = parts.features.weights, parts.start([1, 4])
    expected, _ = run(parts.step, weights, state, target, steps=4)
    half, _ = run(parts.step, weights, state, target, steps=2)
    last, _ = run(parts.step, weights, half, target, steps=2)
    assert equal_trees(last, expected)


@pytest.mark.parametrize("steps", [0, -3])
def test_run_needs_a_step(parts: Parts, steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        run(parts.step, parts.features.weights, *parts.start([0]), steps=steps)


def test_error_of_a_callback_is_raised(parts: Parts) -> None:
    def stop(info: fv.Info) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(parts.step, parts.features.weights, *parts.start([0]), steps=5, callback=stop)


def test_step_is_pure(parts: Parts) -> None:
    state, target = parts.start([0, 1])
    kept = tree_map(torch.clone, (parts.features.weights, state, target))
    first, _ = parts.step(parts.features.weights, state, target)
    assert equal_trees((parts.features.weights, state, target), kept)
    again, _ = parts.step(parts.features.weights, state, target)
    assert equal_trees(first, again)


@pytest.mark.slow
@complex_numbers
def test_compiled_step_equals_the_eager_step_and_compiles_once(parts: Parts) -> None:
    compiled = compile_step(parts.step)
    weights = parts.features.weights
    with torch._dynamo.config.patch(error_on_recompile=True):
        for filters, seed in (([0, 1], 0), ([5, 2], 0), ([3, 3], 9)):
            state, target = parts.start(filters, seed)
            expected, infos = run(parts.step, weights, state, target, steps=2)
            last, reports = run(compiled, weights, state, target, steps=2)
            torch.testing.assert_close(reports.score, infos.score, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(last.best.image, expected.best.image, rtol=1e-3, atol=2e-3)
            assert torch.equal(last.step, expected.step)


@complex_numbers
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "steps"), [("eager", 1), ("aot_eager", 2)])
def test_step_can_be_part_of_a_compiled_function(parts: Parts, backend: str, steps: int) -> None:
    def several_steps(weights: dict[str, Tensor], state: State, target: Tensor) -> tuple[State, Tensor]:
        state, first = parts.step(weights, state, target)
        last = first
        for _ in range(steps - 1):
            state, last = parts.step(weights, state, target)
        return state, last.score - first.score

    compiled = torch.compile(several_steps, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for filters in ([0, 1], [4, 2]):
            state, target = parts.start(filters)
            expected, expected_gain = several_steps(parts.features.weights, state, target)
            last, gain = compiled(parts.features.weights, state, target)
            torch.testing.assert_close(gain, expected_gain, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(last.best.image, expected.best.image, rtol=1e-3, atol=2e-3)
