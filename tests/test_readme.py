"""The README's Python is run, block by block, in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the sweep writes
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    result = names["result"]
    assert tuple(result.images.shape) == (4, 3, 96, 96)  # type: ignore[attr-defined]
    assert tuple(result.history.shape) == (16, 4)  # type: ignore[attr-defined]
    assert tuple(names["many"].steps.shape) == (24,)  # type: ignore[attr-defined]
    assert names["status"].complete  # type: ignore[attr-defined]
    assert names["best"].score == max(entry.score for entry in names["store"])  # type: ignore[attr-defined]
    assert len(list(tmp_path.glob("pictures/block1.conv/filter-*.png"))) == 12
    assert tuple(names["brightest"].shape) == (3,)  # type: ignore[attr-defined]
