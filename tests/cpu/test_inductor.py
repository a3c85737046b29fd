"""Inductor with this library's settings, whatever the environment says."""

from functools import partial

import pytest
import torch
from torch._inductor import config
from torch._inductor.lowering import lowerings
from torch.nn.functional import grid_sample

from featvis_func.cpu.inductor import GRID_SAMPLE, compile_graph


@pytest.mark.parametrize("ci", [None, "true"])
def test_grid_sample_compiles_and_equals_eager_where_ci_is_set(ci: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(lowerings, GRID_SAMPLE, raising=False)
    if ci is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", ci)
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    grid = torch.rand(2, 5, 6, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def sample(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return 2 * grid_sample(images, grid, align_corners=False)

    with config.patch(fx_graph_cache=False):
        compiled = torch.compile(sample, backend=partial(compile_graph, settings={}))
        torch.testing.assert_close(compiled(images, grid), sample(images, grid))
