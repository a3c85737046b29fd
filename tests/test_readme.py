"""The Python blocks of each README run, one after the other in one namespace; links lead somewhere."""

import re
from pathlib import Path

import pytest

import featvis_func as fv

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "featvis_func/README.md", "featvis_func/sweep/README.md", "benchmarks/README.md")


def python_blocks(readme: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def run_blocks(readme: str) -> dict[str, object]:
    names: dict[str, object] = {}
    for block in python_blocks(ROOT / readme):
        exec(compile(block, readme, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the blocks write


def test_readme_blocks_run() -> None:
    names = run_blocks("README.md")
    assert tuple(names["result"].images.shape) == (4, 3, 96, 96)  # type: ignore[attr-defined]
    assert tuple(names["digits"].images.shape) == (4, 1, 28, 28)  # type: ignore[attr-defined]
    assert names["status"].complete  # type: ignore[attr-defined]
    assert tuple(names["info"].score.shape) == (8, 3)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_guide_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fv.render.__kwdefaults__ or {}, "steps", 8)  # of the blocks that do not say how many
    names = run_blocks("featvis_func/README.md")
    assert tuple(names["result"].history.shape) == (16, 4)  # type: ignore[attr-defined]
    assert tuple(names["many"].steps.shape) == (24,)  # type: ignore[attr-defined]
    assert tuple(names["brightness"].shape) == (3,)  # type: ignore[attr-defined]
    assert Path("gallery/index.html").exists()


@pytest.mark.slow
def test_sweep_guide_blocks_run(tmp_path: Path) -> None:
    names = run_blocks("featvis_func/sweep/README.md")
    assert names["status"].complete  # type: ignore[attr-defined]
    assert names["best"].score == max(entry.score for entry in names["store"])  # type: ignore[attr-defined]
    assert len(list(tmp_path.glob("pictures/block1.conv/filter-*.png"))) == 12


@pytest.mark.slow
def test_benchmark_guide_blocks_run() -> None:
    run_blocks("benchmarks/README.md")


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES)
def test_links_and_pictures_exist(readme: str) -> None:
    path = ROOT / readme
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if not target.startswith(("http://", "https://"))]
    assert local
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES)
def test_links_within_a_readme_lead_to_a_heading(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert set(links) <= anchors
