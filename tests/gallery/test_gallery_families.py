"""Galleries of families of objectives: names of members, nearest members, columns of a user's file."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from featvis_func.cli import main as cli
from featvis_func.gallery import build_gallery, neighbours
from featvis_func.gallery.neighbours import nearest
from featvis_func.rendering.result import Result
from featvis_func.sweep.plan import folder_of
from tests.gallery_sites import FACETS, FAMILY, NAMES, family_directions, family_store
from tests.sweep_toys import Toy, fill, toy_result, toy_run

PLANNED = (0, 1, 2, 3, 4, 6, 8)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Sweep of directions with names, of a layer and of facets."""
    return family_store(tmp_path / "store")


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def data_of(site: Path, label: str) -> dict[str, Any]:
    """Return the data of a layer that the scripts read."""
    text = (site / "layers" / folder_of(label) / "data.js").read_text()
    return json.loads(text[text.index("] = ") + 4 : text.rindex(";")])


def neighbours_of(site: Path, label: str, chunk: int = 0) -> dict[int, dict[int, float]]:
    """Return member -> first image of each neighbour -> cosine."""
    text = (site / "layers" / folder_of(label) / f"neighbours/{chunk}.js").read_text()
    members = json.loads(text.partition(" = ")[2].rstrip(";\n"))
    return {int(member): dict(map(tuple, pairs)) for member, pairs in members.items()}


def result(**changes: Any) -> Result:
    """A result of a family of two members with two facets each, whose directions are equal but for their length."""
    record = {"layers": ["conv"], "group": 2, "tensors": {}}
    config = {
        "layer": "mine x2",
        "model": "toy",
        "objective": "facets(<b>, 2)",
        "objective_code": {"expression": "own_objective", "functions": [], "values": {"own_objective": "yours"}},
        "family": record,
        "names": {"4": "four, facet 0", "5": "four, facet 1", "2": "two, facet 0", "3": "two, facet 1"},
    }
    vectors = torch.tensor([[1.0, 1], [1, 1], [2, 2], [2, 2]])
    return replace(toy_result("mine", [4, 5, 2, 3], 7), config={**config, **changes}, vectors=vectors)


# --- pages ----------------------------------------------------------------------------------------------------------


def test_pages_say_what_a_family_is_and_name_its_members(store: Path) -> None:
    gallery = build_gallery(store)
    assert (gallery.layers, gallery.families, gallery.filters, gallery.problems) == (3, 2, 17, ())
    site = gallery.path.parent
    index = (site / "index.html").read_text()
    assert "17 of 17 images in 1 layer and 2 families of objectives" in index
    assert "directions(&#39;conv&#39;, &lt;matrix&gt;)</code> of layer conv" in index
    folder = site / "layers" / folder_of(FAMILY)
    page = (folder / "index.html").read_text()
    assert "7 members" in page
    assert "<code>directions(&#39;conv&#39;, &lt;matrix&gt;)</code> of layer conv" in page
    assert page.count("golden retriever") == 4  # hover, alternative text, caption, button
    assert "<title>golden retriever – directions:conv:8 – " in (folder / "8.html").read_text()
    assert 'rel="next" title="goldfish"' in (folder / "3.html").read_text()
    assert [row[6:] for row in data_of(site, FAMILY)["filters"]] == [[NAMES[n]] if NAMES[n] else [] for n in PLANNED]
    facets = (site / "layers" / folder_of(FACETS) / "index.html").read_text()
    assert "4 facets, 2 of each member" in facets
    assert "1 at 1,1, facet 1" in facets
    assert "Family of objectives" not in (site / "layers/conv/index.html").read_text()


def test_names_are_escaped(store: Path) -> None:
    site = build_gallery(store).path.parent
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "<script>alert" not in text
        assert "49" not in re.findall(r'class="name"[^>]*>([^<]*)<', text)
        assert "quo&#34;ted &amp; &#39;single&#39;" in text or 'quo"ted' not in text


def test_a_result_of_a_family(tmp_path: Path) -> None:
    result().save(tmp_path / "saved")
    for given, out in ((result(), tmp_path / "a"), (tmp_path / "saved", None)):
        assert build_gallery(given, out).families == 1
    site = tmp_path / "a"
    assert files_of(site) == files_of(tmp_path / "saved/gallery")
    assert [(row[0], row[6]) for row in data_of(site, "mine x2")["filters"]] == [
        (2, "two, facet 0"), (3, "two, facet 1"), (4, "four, facet 0"), (5, "four, facet 1"),
    ]  # fmt: skip
    assert neighbours_of(site, "mine x2") == {1: {4: 1.0}, 2: {2: 1.0}}
    assert "facets(&lt;b&gt;, 2)" in (site / "layers" / folder_of("mine x2") / "index.html").read_text()


def test_a_damaged_file_of_members_is_reported(store: Path) -> None:
    build_gallery(store)
    (path,) = (store / "members").glob("directions*")
    data = path.read_bytes()
    path.write_bytes(data[:40])
    gallery = build_gallery(store)
    assert gallery.filters == 17
    (problem,) = gallery.problems
    assert problem.startswith("the names and directions of directions:conv: ")
    folder = gallery.path.parent / "layers" / folder_of(FAMILY)
    assert not (folder / "neighbours").exists()
    assert "neighbours" not in (folder / "8.html").read_text()
    assert "golden" not in (folder / "8.html").read_text()
    path.write_bytes(data)
    assert build_gallery(store).problems == ()
    assert "golden" in (folder / "8.html").read_text()
    fresh = build_gallery(store, store.parent / "fresh").path.parent
    assert files_of(store / "gallery") == files_of(fresh)


# --- nearest members ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_nearest_rows_have_the_highest_cosines(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_ELEMENTS", block)
    vectors = torch.randn(23, 5, dtype=torch.float64) * torch.logspace(-30, 30, 23, dtype=torch.float64)[:, None]
    vectors[7] = 0
    expected = cosine_similarity(vectors[:, None], vectors[None], dim=-1, eps=1e-300)
    for i, found in enumerate(nearest(vectors, 4)):
        others = [j for j in range(23) if j not in (i, 7)]
        ordered = sorted(others, key=lambda j: -float(expected[i, j]))[:4]
        assert [j for j, _ in found] == ([] if i == 7 else ordered)
        assert all(cosine == pytest.approx(float(expected[i, j]), abs=1e-5) for j, cosine in found)
    assert list(nearest(torch.ones(1, 3), 8)) == [[]]


def test_only_rendered_members_are_neighbours(store: Path) -> None:
    site = build_gallery(store).path.parent
    found = neighbours_of(site, FAMILY)
    assert set(found) == set(PLANNED)
    assert {n for near in found.values() for n in near} == set(PLANNED)
    cosines = cosine_similarity(family_directions()[:, None], family_directions()[None], dim=-1)
    for member, near in found.items():
        assert list(near.values()) == sorted(near.values(), reverse=True)
        assert all(value == pytest.approx(float(cosines[member, n]), abs=6e-4) for n, value in near.items())
    assert list(found[0])[:2] == [4, 8]
    assert not (site / "layers" / folder_of(FACETS) / "neighbours").exists()


def test_rebuild_updates_the_neighbours_but_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", 3)
    complete = family_store(tmp_path / "store", layer=False)
    hidden = sorted((complete / "units" / folder_of(FAMILY)).glob("*.json"))[-1]
    data = hidden.read_bytes()
    hidden.unlink()
    site = build_gallery(complete).path.parent
    assert build_gallery(complete).made == 0
    before = files_of(site)
    assert list(neighbours_of(site, FAMILY)[0])[:2] == [4, 2]
    hidden.write_bytes(data)
    assert build_gallery(complete).made == 3  # the new one, and the unit before, whose last page links to it
    after = files_of(site)
    changed = {name.split("/", 2)[-1] for name in before.keys() & after.keys() if before[name] != after[name]}
    lists = {"gallery.json", "site.js", "index.html", "data.js"}
    assert changed == lists | {"6.html", "neighbours/0.js", "neighbours/1.js", "neighbours/2.js"}
    assert list(neighbours_of(site, FAMILY)[0])[:2] == [4, 8]
    fresh = build_gallery(complete, tmp_path / "fresh").path.parent
    assert after == files_of(fresh)


def test_neighbours_that_are_up_to_date_are_not_computed_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = build_gallery(store).path.parent

    def never(*arguments: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(neighbours, "nearest", never)
    assert build_gallery(store).made == 0
    (site / "layers" / folder_of(FAMILY) / "neighbours/0.js").unlink()
    with pytest.raises(AssertionError, match="computed again"):
        build_gallery(store)


@pytest.mark.slow
def test_neighbours_of_a_large_dictionary_take_seconds() -> None:
    vectors = torch.randn(16_384, 768)
    count = sum(len(found) for found in nearest(vectors, 8))
    assert count == 16_384 * 8


# --- columns of a user's file ---------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def columns_of(site: Path, label: str) -> dict[str, dict[int, Any]]:
    """Return the values of each column by the numbers of the filters; those without a value are left out."""
    data = data_of(site, label)
    numbers = [row[0] for row in data["filters"]]
    return {
        column["name"]: {n: v for n, v in zip(numbers, column["values"], strict=True) if v is not None}
        for column in data.get("columns", [])
    }


def test_columns_by_number_and_name(store: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.csv",
        "\ufefflayer,Member,density,note\r\n"
        'directions:conv,0,1e-3,"one, ""two"""\r\n'
        "directions:conv,golden retriever, 2 ,\r\n"
        "\r\n"
        "directions:conv,5,7,of a member that is not rendered\r\n"
        "directions:conv,1.0,nan,</script>\r\n"
        "conv,2,-inf,x\r\n"
        "neuron:conv x2,1 at 0,0,9,y\r\n".replace("1 at 0,0", '"1 at 0,0"'),
    )
    first = build_gallery(store)
    gallery = build_gallery(store, columns=file)
    assert gallery.made == 0, "pages do not depend on the columns"
    site = first.path.parent
    assert columns_of(site, FAMILY) == {"density": {0: 1e-3, 8: 2.0}, "note": {0: 'one, "two"', 1: "</script>"}}
    assert columns_of(site, "conv") == {"density": {2: float("-inf")}, "note": {2: "x"}}
    assert columns_of(site, FACETS) == {"density": {0: 9.0, 1: 9.0}, "note": {0: "y", 1: "y"}}, "both facets"
    assert [column["numeric"] for column in data_of(site, FAMILY)["columns"]] == [True, False]
    build_gallery(store)
    assert columns_of(site, FAMILY) == {}


def test_columns_of_one_layer_need_no_column_of_layers(tmp_path: Path) -> None:
    fill_store = family_store(tmp_path / "store", layer=False)
    for key, row in (("index", "4"), ("name", "goldfish"), ("filter", "4"), ("number", "goldfish")):
        file = write(tmp_path / "c.csv", f"score2,{key},empty\n1,{row},\n" if key != "index" else "index,score2\n4,1\n")
        site = build_gallery(fill_store, columns=file).path.parent
        assert columns_of(site, FAMILY) == {"score2": {4: 1.0}}


def test_a_row_may_name_the_layer_of_a_family(tmp_path: Path) -> None:
    file = write(tmp_path / "c.csv", 'layer,member,x\nconv,two,1\nconv,"four, facet 1",NA\nconv,99,3\n')
    site = build_gallery(result(), tmp_path / "site", columns=file).path.parent
    assert columns_of(site, "mine x2") == {"x": {2: 1.0, 3: 1.0}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("member,x\n", "has no rows"),
        ("member\n1\n", "has no column of values beside 'member'"),
        ("member;x\n1;2\n", "has no column of values beside 'member;x'|is not the number|no member"),
        ("member,x\n1,2,3\n", "line 2: expected 2 values, as in the header, got 3"),
        ("member,x\n1\n", "line 2: expected 2 values, as in the header, got 1"),
        ("member,x\n1,2\n\n1,3\n", "line 4: '1' was in line 2 already"),
        ("member,x\n4,2\ngoldfish,3\n", "line 3: 'goldfish' was in line 2 already"),
        ("member,x\n10,2\n", "line 2: directions:conv has no number 10; it has 0-9"),
        ("member,x\ngoldfich,2\n", "line 2: directions:conv has no member 'goldfich'; did you mean 'goldfish'"),
        ("member,x\n,2\n", "line 2: directions:conv has no member ''"),
        ("member,x\n5,2\n", "has no row of a filter or member that the gallery shows"),
        ("member,x,x\n1,2,3\n", "has two columns 'x'"),
        ("member,,x\n1,2,3\n", "column 2 has no name"),
        ("member,x\n1,\n2,nan\n", "has no column of values beside 'member'"),
        ("layer,member,x\nhead,1,2\n", "line 2: the gallery has no layer 'head'"),
        ('member,x\n"1,2\n', "cannot be read as CSV: "),
        ("member,x\n1,2\n" + "\udcff", "cannot be read as CSV: "),
    ],
)
def test_files_without_usable_columns_are_rejected(text: str, message: str, tmp_path: Path) -> None:
    folder = family_store(tmp_path / "store", layer=False)
    file = tmp_path / "c.csv"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        build_gallery(folder, columns=file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)
    assert not (folder / "gallery").exists()


def test_columns_of_several_layers_and_of_unknown_names_are_rejected(tmp_path: Path) -> None:
    fill(tmp_path / "s", toy_run(), Toy())
    file = write(tmp_path / "c.csv", "filter,x\n1,2\n")
    with pytest.raises(ValueError, match=r"needs a column 'layer', since the gallery has 2 layers: block1.conv, head"):
        build_gallery(tmp_path / "s", columns=file)
    write(file, "layer,filter,x\nhead,cat,2\n")
    with pytest.raises(ValueError, match="'cat' is not the number of a filter, and head has no names"):
        build_gallery(tmp_path / "s", columns=file)
    write(file, "layer,filter,x\nhead,4,2\n")
    with pytest.raises(ValueError, match="head has no number 4; it has 0-3"):
        build_gallery(tmp_path / "s", columns=file)


def test_columns_command(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "c.csv", "layer,member,x\ndirections:conv,3,2\n")
    assert cli.main(["gallery", str(store), "--columns", str(file)]) == 0
    assert capsys.readouterr().out.startswith("17 images of 1 layer and 2 families, 17 of them made now: ")
    assert columns_of(store / "gallery", FAMILY) == {"x": {3: 2.0}}
    assert cli.main(["gallery", str(store), "--columns", str(tmp_path / "nowhere.csv")]) == 2
    assert capsys.readouterr().err == f"featvis: error: no file {str(tmp_path / 'nowhere.csv')!r}\n"
    assert cli.main(["gallery", str(store), "--columns", str(tmp_path)]) == 2
    assert "cannot be read as CSV: Is a directory" in capsys.readouterr().err


def test_status_says_what_a_sweep_renders(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = family_store(tmp_path / "members", layer=False)
    for folder, words in ((store, "17 of 17 images"), (members, "7 of 7 members")):
        for command in ("status", "validate"):
            assert cli.main([command, str(folder)]) == 0
            assert words in capsys.readouterr().out
