"""Checks of results that several test modules share."""

import torch

from featvis_func.rendering.result import Result


def check_consistent(result: Result, steps: int) -> None:
    """Assert what holds of every result whose scores are finite and whose filters took all steps."""
    count = len(result.filters)
    assert result.history.shape == (steps, count)
    assert result.images.shape[0] == result.activations.shape[0] == count
    assert len(result.status) == count
    assert {result.images.dtype, result.activations.dtype, result.scores.dtype, result.history.dtype} == {torch.float32}
    assert 0 <= result.images.min() <= result.images.max() <= 1
    if (result.best_step == result.steps).all():  # the average of the run, evaluated after the last step
        assert result.scores.isfinite().all()
    else:
        assert torch.equal(result.scores, result.history.max(0).values)
        assert torch.equal(result.best_step, result.history.argmax(0))
    assert result.steps.tolist() == [steps] * count
    assert not result.images.requires_grad


def equal_results(a: Result, b: Result) -> bool:
    """Whether two results are equal, bit by bit."""
    tensors = ("images", "activations", "scores", "best_step", "history", "steps")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and (
        (a.filters, a.status, a.config) == (b.filters, b.status, b.config)
    )
