"""Browser tests of the gallery of families: names, search, nearest members, columns of a user's file."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featvis_func.gallery import build_gallery
from tests.gallery_browser import Site, Visit, focused, grid, images_load, pinned, press, wait_for_url_ending
from tests.gallery_sites import FACETS, FAMILY, NAMES, family_store, folder_url

LAYER = f"layers/{folder_url(FAMILY)}"
PLANNED = [0, 1, 2, 3, 4, 6, 8]
COLUMNS = """layer,member,density,a "long" <b>column</b> & its name,note
directions:conv,8,0.25,a10,
directions:conv,1,1e-5,a9,"</script><script>alert(1)</script> and more than twenty-four characters"
directions:conv,3,-3,,x
directions:conv,4,,A2,
conv,1,2,b,
conv,0,3,a,
"""
TEXT_COLUMN = COLUMNS.partition("density,")[2].partition(",")[0]


@pytest.fixture(scope="module")
def site(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    store = family_store(folder / "store")
    (folder / "columns.csv").write_text(COLUMNS.replace(TEXT_COLUMN, '"a ""long"" <b>column</b> & its name"'))
    return build_gallery(store, columns=folder / "columns.csv").path.parent


@pytest.fixture
def visit(browser: Any, site: Path) -> Iterator[Visit]:
    """Visit of the gallery as local files."""
    opener = Visit(browser, Site(site, f"{site.as_uri()}/"))
    yield opener
    opener.close()


def names(page: Any, selector: str = "#grid .name") -> list[str]:
    """Return the names that are shown, without the spaces that a browser does not draw."""
    return page.locator(selector).evaluate_all("all => all.map(e => e.textContent)")


@pytest.mark.slow
def test_names_are_shown_in_the_grid_and_on_the_pages(visit: Visit) -> None:
    page = visit(f"{LAYER}/index.html")
    named = [NAMES[n] for n in PLANNED if NAMES[n]]
    assert names(page) == named
    assert page.locator("#grid a[title]").evaluate_all("all => all.map(a => a.title)") == named
    html = page.locator("#grid").inner_html()
    page.locator("#sort").select_option("score")
    page.locator("#sort").select_option("number")
    assert grid(page) == PLANNED
    same = (
        "h => { const t = document.createElement('div'); t.innerHTML = h; return t.textContent.replace(/\\s+/g, '') }"
    )
    assert page.evaluate(same, page.locator("#grid").inner_html()) == page.evaluate(same, html)
    page.locator("#grid a").first.click()
    wait_for_url_ending(page, "/0.html")
    assert page.title().startswith(f"{NAMES[0]} – {FAMILY}:0 – ")
    assert page.locator("h1").inner_text() == f"{FAMILY}:0 {NAMES[0]}"
    assert page.locator("#after").get_attribute("title") == NAMES[1]
    page.goto(f"{visit.site.url}{LAYER}/0.html#sort=score&order=rising")
    assert page.locator("#after").get_attribute("title") == "goldfish" or page.locator("#before").is_visible()
    page.goto(f"{visit.site.url}{LAYER}/2.html")
    assert page.locator("h1").inner_text() == f"{FAMILY}:2", "an empty name is left out"


@pytest.mark.slow
def test_members_are_found_by_name(visit: Visit) -> None:
    page = visit(f"{LAYER}/index.html")
    for text, expected in [
        ("GOLD", [4, 8]),
        ("retriever golden", [8]),
        ('"golden ret"', [8]),
        ('"retriever golden"', []),
        ("日本", [6]),
        ("</script>", [0]),
        ("3-4", [3, 4]),
        ("nothing", []),
    ]:
        page.locator("#q").fill(text)
        assert grid(page) == expected, text
    assert page.locator("#said").inner_text() == "No filter matches nothing"
    page.locator("#q").fill("gold")
    press(page, "Enter")
    assert focused(page) == 4
    page.locator("#q").fill("tinca")
    press(page, "Enter")
    wait_for_url_ending(page, "/3.html")
    page.locator("#q").fill("gold")
    press(page, "Enter")
    wait_for_url_ending(page, "index.html#q=gold")
    assert grid(page) == [4, 8]
    page.goto(f"{visit.site.url}layers/{folder_url(FACETS)}/index.html")
    page.locator("#q").fill("at 1,1")
    assert grid(page) == [2, 3]


@pytest.mark.slow
def test_nearest_members_are_links(visit: Visit) -> None:
    page = visit(f"{LAYER}/0.html#theme=dark")
    items = page.locator("#near li")
    assert items.evaluate_all("all => all.map(i => Number(i.dataset.n))")[:2] == [4, 8]
    assert items.first.inner_text().split() == ["4", "1.000", "goldfish"]
    assert images_load(page, "#near img")
    items.nth(1).locator("a").click()
    wait_for_url_ending(page, "/8.html#theme=dark")
    assert page.locator("h1").inner_text() == f"{FAMILY}:8 golden retriever"
    assert page.locator("#facets").count() == 0
    page.goto(f"{visit.site.url}layers/{folder_url(FACETS)}/2.html")
    assert page.locator("#near").count() == 0, "neurons have no directions"
    assert names(page, "#facets .name") == ["1 at 1,1, facet 1"]
    page.locator("#facets a").click()
    wait_for_url_ending(page, "/3.html")
    assert names(page, "#facets .name") == ["1 at 1,1, facet 0"]


@pytest.mark.slow
def test_pinned_members_keep_their_names(visit: Visit) -> None:
    page = visit(f"{LAYER}/index.html")
    press(page, "ArrowRight", "p")
    page.locator("#grid a").last.click()
    wait_for_url_ending(page, f"/8.html#pins={folder_url(FAMILY)}:0")
    press(page, "p")
    expected = [f"{FAMILY}:0, {NAMES[0]}", f"{FAMILY}:8, golden retriever"]
    assert pinned(page) == expected
    page.locator("header a").first.click()
    page.wait_for_url("**/gallery/index.html#*")
    page.locator("#pin-list img").nth(1).wait_for()
    assert pinned(page) == expected, "on a page without the data of the family"
    press(page, "c")
    page.locator("#compared h2").nth(1).wait_for()
    assert names(page, "#compared .name") == [NAMES[0], "golden retriever"]
    assert page.locator("#compared dt", has_text="density").count() == 1
    fresh = visit(f"compare.html#pins={folder_url(FAMILY)}:8")
    fresh.locator("#compared h2").wait_for()
    fresh.get_by_role("link", name="torchvision").click()
    fresh.locator("#pin-list img").wait_for()
    assert pinned(fresh) == expected[1:]


@pytest.mark.slow
def test_grids_are_sorted_by_columns(visit: Visit) -> None:
    page = visit(f"{LAYER}/index.html")
    text = 'a "long" <b>column</b> & its name'
    assert page.locator("#sort option").all_inner_texts() == ["number", "score", "convergence", "density", text, "note"]
    for label, rising, falling, shown in [
        ("density", [3, 1, 8, 0, 2, 4, 6], [8, 1, 3, 0, 2, 4, 6], ["-3", "1e-05", "0.25", "none"]),
        (text, [4, 1, 8, 0, 2, 3, 6], [8, 1, 4, 0, 2, 3, 6], ["A2", "a9", "a10", "none"]),
    ]:
        page.locator("#sort").select_option(label=label)
        assert grid(page) == rising
        assert page.locator("#grid i").all_inner_texts()[:4] == shown
        page.locator("#order").click()
        assert grid(page) == falling
        deep = visit(page.url.removeprefix(visit.site.url))
        assert grid(deep) == falling, "the URL holds the whole state"
        assert deep.locator("#sort option:checked").inner_text() == label
    page.locator("#grid a").nth(1).click()
    page.wait_for_url("**/1.html#*")
    assert page.locator("#after").inner_text() == "4 →"
    facts = page.locator("#facts .column").all_inner_texts()
    assert [fact.split("\n")[0] for fact in facts] == ["density", text, "note"]
    assert facts[2].endswith("</script><script>alert(1)</script> and more than twenty-four characters")
    page.goto(f"{visit.site.url}{LAYER}/2.html")
    assert page.locator("#facts .column").count() == 0
    page.goto(f"{visit.site.url}layers/conv/index.html#sort=column:density")
    assert grid(page) == [1, 0, 2, 3, 4, 5]
    page.goto(f"{visit.site.url}layers/{folder_url(FACETS)}/index.html#sort=column:density")
    assert grid(page) == [0, 1, 2, 3], "a layer without the column"
    assert page.locator("#sort").input_value() == "number"


@pytest.mark.slow
def test_model_page_finds_members_of_families(visit: Visit) -> None:
    page = visit()
    assert page.locator(".layers h2").all_inner_texts() == [FAMILY, "conv", FACETS]
    page.locator("#q").fill(f"{FAMILY}:8")
    press(page, "Enter")
    wait_for_url_ending(page, "/8.html")


@pytest.mark.slow
def test_pages_of_families_work_without_javascript(visit: Visit) -> None:
    page = visit(f"{LAYER}/8.html", java_script_enabled=False)
    assert page.locator("h1").inner_text() == f"{FAMILY}:8 golden retriever"
    assert page.locator("#near").is_hidden()
    page.locator("#before").click()
    wait_for_url_ending(page, "/6.html")


@pytest.mark.slow
@pytest.mark.parametrize("path", [f"{LAYER}/index.html", f"{LAYER}/8.html", "index.html", "compare.html#pins="])
def test_pages_of_families_fit_and_are_accessible(visit: Visit, path: str) -> None:
    pins = "*".join(f"{folder_url(FAMILY)}:{n}" for n in (0, 6, 8))
    page = visit(path.replace("pins=", f"pins={pins}"))
    if path.startswith("compare"):
        page.locator("#compared h2").nth(2).wait_for()
    try:
        axe = importlib.import_module("axe_playwright_python.sync_playwright").Axe()
    except ImportError:
        axe = None
    for width in (1280, 320):
        page.set_viewport_size({"width": width, "height": 800})
        content, window = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert content <= window, f"{path} at {width}"
        for violation in axe.run(page, options={"preload": False}).response["violations"] if axe else ():
            elements = [node["html"] for node in violation["nodes"]][:3]
            assert violation["impact"] not in ("serious", "critical"), (violation["id"], violation["help"], elements)
