"""Browser tests of the gallery: mouse, keyboard and touch, from local files and from a web server."""

import importlib
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from featvis_func.cli import main as cli
from featvis_func.sweep.plan import folder_of
from tests.gallery_browser import Site, Visit, focused, grid, images_load, pinned, press, wait_for_url_ending
from tests.gallery_sites import (
    DAMAGED,
    EMPTY,
    FILTERS,
    HOSTILE,
    LAYERS,
    LONG,
    MODEL,
    QUOTED,
    expected_order,
    folder_url,
    heavy_site,
    served,
    shown_site,
    toy_site,
)  # fmt: skip

PAGES = {
    "model": "index.html",
    "layer": f"layers/{folder_url(HOSTILE)}/index.html",
    "filter": f"layers/{folder_url(HOSTILE)}/3.html",
    "compare": f"compare.html#pins={folder_url(HOSTILE)}:3*conv:10",
}


@pytest.fixture(scope="module")
def toy(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return toy_site(folder / "toy")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with ExitStack() as stack:
        yield stack.enter_context(served(folder.parent)) + "sub%20folder%20%C3%A9%23/"


@pytest.fixture
def visit(browser: Any, toy: Path) -> Iterator[Visit]:
    """Visit of the toy gallery as local files."""
    opener = Visit(browser, Site(toy, f"{toy.as_uri()}/"))
    yield opener
    opener.close()


@pytest.fixture
def web(browser: Any, toy: Path, server: str) -> Iterator[Visit]:
    """Visit of the toy gallery on a web server, below its root."""
    opener = Visit(browser, Site(toy, f"{server}toy/"))
    yield opener
    opener.close()


@pytest.fixture(params=["file", "http"])
def anywhere(request: pytest.FixtureRequest) -> Visit:
    """Visit of the toy gallery as local files and on a web server."""
    return request.getfixturevalue({"file": "visit", "http": "web"}[request.param])


# Navigation.


@pytest.mark.slow
def test_links_lead_from_the_model_to_a_filter_and_back(anywhere: Visit) -> None:
    page = anywhere()
    assert page.locator("h1").inner_text() == MODEL
    assert page.locator(".layers h2").all_inner_texts() == list(LAYERS)
    assert images_load(page, ".layers li:first-child img")
    page.get_by_role("link", name="conv", exact=True).click()
    wait_for_url_ending(page, "conv/index.html")
    assert grid(page) == list(range(LAYERS["conv"]))
    page.locator("#grid a").nth(12).click()
    wait_for_url_ending(page, "layers/conv/12.html")
    assert page.locator("h1").inner_text() == "conv:12"
    assert images_load(page, ".views img")
    page.locator("#after").click()
    wait_for_url_ending(page, "/13.html")
    page.locator("#before").click()
    wait_for_url_ending(page, "/12.html")
    page.go_back()
    page.go_back()
    page.go_back()
    wait_for_url_ending(page, "conv/index.html")
    page.go_forward()
    wait_for_url_ending(page, "/12.html")
    page.locator("#up").click()
    page.wait_for_function("document.activeElement?.closest('#grid li')")
    assert focused(page) == 12
    assert "f=12" not in page.url
    page.locator("header a").first.click()
    wait_for_url_ending(page, "toy/index.html")


@pytest.mark.slow
def test_filter_page_follows_the_sort_order_of_its_url(visit: Visit) -> None:
    order = expected_order("score", layer="wide", descending=True, dead=False)
    index = 600
    number = order[index]
    page = visit(f"layers/wide/{number}.html#sort=score&dead=hide")
    assert page.locator("#before").inner_text() == f"← {order[index - 1]}"
    assert page.locator("#after").inner_text() == f"{order[index + 1]} →"
    page.locator("#up").click()
    page.wait_for_function("document.activeElement?.closest('#grid li')")
    assert focused(page) == number
    assert grid(page) == order[500:]
    assert page.locator("#pager b").inner_text() == "2"
    assert page.locator("#grid a:focus").evaluate("a => a.getBoundingClientRect().top > 60")


@pytest.mark.slow
@pytest.mark.parametrize(("key", "descending"), [("score", True), ("converged", False)])
def test_grid_is_sorted_by_score_and_convergence(visit: Visit, key: str, descending: bool) -> None:
    page = visit("layers/conv/index.html#theme=dark")
    before = page.locator("#grid i").all_inner_texts()
    page.locator("#sort").select_option(key)
    assert grid(page) == expected_order(key, descending=descending)
    assert f"sort={key}" in page.url
    page.locator("#order").click()
    reversed_order = expected_order(key, descending=not descending)
    assert grid(page) == reversed_order
    deep = visit(page.url.removeprefix(visit.site.url))
    assert grid(deep) == reversed_order, "the URL holds the whole state"
    page.locator("#sort").select_option("number")
    assert page.locator("#grid i").all_inner_texts() == before, "the script creates the same thumbnails as the HTML"
    assert "sort=" not in page.url
    page.locator("#order").click()
    assert grid(page) == list(reversed(range(LAYERS["conv"])))


@pytest.mark.slow
def test_sorting_covers_all_pages_of_a_layer(visit: Visit) -> None:
    page = visit("layers/wide/page-3.html")
    page.locator("#sort").select_option("score")
    order = expected_order("score", layer="wide", descending=True)
    assert grid(page) == order[1000:]
    page.reload()
    assert grid(page) == order[1000:]
    page.locator("#pager").get_by_text("2").click()
    wait_for_url_ending(page, "page-2.html#sort=score")
    assert grid(page) == order[500:1000]
    page.locator("#order").click()
    assert grid(page) == expected_order("score", layer="wide")[500:1000]
    page.goto(f"{visit.site.url}layers/wide/page-3.html#dead=hide")
    assert grid(page) == expected_order(layer="wide", dead=False)[500:], "without dead filters there are two pages"
    assert page.locator("#pager > *").all_inner_texts() == ["1", "2"]


@pytest.mark.slow
def test_dead_filters_can_be_hidden(visit: Visit) -> None:
    page = visit("layers/conv/index.html")
    assert page.locator("#grid li.dead").count() == LAYERS["conv"] - len(expected_order(dead=False))
    assert page.locator("#grid li[data-n='3']").inner_text().split() == ["3", "dead", "★"]
    page.get_by_label("dead filters").uncheck()
    assert grid(page) == expected_order(dead=False)
    assert "dead=hide" in page.url
    page.locator("#grid a").nth(3).click()
    wait_for_url_ending(page, "/4.html#dead=hide")
    assert page.locator("#before").inner_text() == "← 2"
    page.goto(f"{visit.site.url}layers/conv/3.html#dead=hide")
    assert "Dead" in page.locator(".note").inner_text()
    page.goto(f"{visit.site.url}layers/conv/52.html")
    assert "not finite" in page.locator(".note").inner_text()
    page.goto(f"{visit.site.url}layers/conv/2.html")
    assert page.locator(".facts div", has_text="Score").inner_text().split() == ["Score", "none"]


@pytest.mark.slow
def test_layer_search_finds_numbers_and_ranges(visit: Visit) -> None:
    page = visit("layers/wide/page-3.html")
    for text, expected in [
        ("7", [7]),
        ("10-12, 900 1", [1, 10, 11, 12, 900]),
        ("995-", list(range(995, FILTERS))),
        ("4000", []),
    ]:
        page.locator("#q").fill(text)
        assert grid(page) == expected
    assert page.locator("#said").inner_text() == "No filter matches 4000"
    page.locator("#q").fill("conv")
    assert "is not a filter number" in page.locator("#said").inner_text()
    page.locator("#q").fill("5-6")
    assert "2 found" in page.locator("#said").inner_text()
    deep = visit(page.url.removeprefix(visit.site.url))
    assert grid(deep) == [5, 6]
    press(page, "Enter")
    assert focused(page) == 5
    press(page, "/", "Escape")
    assert grid(page) == list(range(1000, FILTERS))
    page.locator("#q").fill("1009")
    press(page, "Enter")
    wait_for_url_ending(page, "wide/1009.html")
    page.locator("#q").fill("4000")
    press(page, "Enter")
    assert page.locator("#q").evaluate("q => q.validationMessage") == "This layer has no filter 4000"
    page.locator("#q").fill("17")
    press(page, "Enter")
    wait_for_url_ending(page, "wide/17.html")


@pytest.mark.slow
def test_model_search_finds_layers_and_filters(visit: Visit) -> None:
    page = visit()
    press(page, "/")
    page.keyboard.type("CRIPT")
    assert page.locator(".layers > li:visible").count() == 1
    assert page.locator("#said").inner_text() == "1 layer"
    press(page, "Enter")
    wait_for_url_ending(page, f"{folder_url(HOSTILE)}/index.html")
    assert page.locator("h1").inner_text() == HOSTILE
    page.goto(f"{visit.site.url}index.html#q=nothing")
    assert page.locator("#said").inner_text() == "No layer name contains “nothing”"
    page.locator("#q").fill("conv:52")
    press(page, "Enter")
    wait_for_url_ending(page, "conv/52.html")
    page.goto(visit.site.url + "index.html")
    page.locator("#q").fill("conv:60")
    press(page, "Enter")
    assert page.locator("#said").inner_text() == "conv has no filter 60"


@pytest.mark.slow
def test_keyboard_shortcuts_navigate(visit: Visit) -> None:
    page = visit("layers/conv/index.html#sort=score")
    order = expected_order("score", descending=True)
    columns = page.locator("#grid").evaluate("g => getComputedStyle(g).gridTemplateColumns.split(' ').length")
    press(page, "ArrowDown")
    assert focused(page) == order[0]
    press(page, "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft")
    assert focused(page) == order[columns + 1]
    press(page, "ArrowUp")
    assert focused(page) == order[1]
    press(page, "Tab")
    assert page.evaluate("document.activeElement.classList[0]") == "pin"
    press(page, "Shift+Tab", "Enter")
    wait_for_url_ending(page, f"conv/{order[1]}.html#sort=score")
    press(page, "ArrowRight")
    wait_for_url_ending(page, f"conv/{order[2]}.html#sort=score")
    press(page, "ArrowLeft")
    wait_for_url_ending(page, f"conv/{order[1]}.html#sort=score")
    press(page, "Escape")
    wait_for_url_ending(page, "conv/index.html#sort=score")
    page.wait_for_function("document.activeElement?.closest('#grid li')")
    assert focused(page) == order[1]
    page.get_by_label("dead filters").focus()
    press(page, "/")
    assert page.evaluate("document.activeElement.id") == "q"
    press(page, "Shift+ArrowRight")
    assert page.url.endswith("conv/index.html#sort=score"), "keys typed in the search field do not navigate"
    press(page, "Escape", "Shift+ArrowRight")
    wait_for_url_ending(page, f"{folder_url(HOSTILE)}/index.html#sort=score")
    press(page, "Shift+ArrowLeft")
    wait_for_url_ending(page, "conv/index.html#sort=score")
    press(page, "Escape")
    wait_for_url_ending(page, "toy/index.html#sort=score")
    press(page, "Escape")
    wait_for_url_ending(page, "toy/index.html#sort=score")


@pytest.mark.slow
def test_tab_order_follows_the_layout(visit: Visit) -> None:
    page = visit("layers/conv/index.html")
    order = []
    for _ in range(9):
        press(page, "Tab")
        order.append(page.evaluate("(e => e.id || e.classList[0] || e.textContent)(document.activeElement)"))
    assert order == [
        "skip",
        MODEL,
        "q",
        "theme",
        "sort",
        "order",
        "dead",
        page.locator("#grid a").first.text_content(),
        "pin",
    ]
    page.reload()
    press(page, "Tab", "Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.url.endswith("index.html")


# Pinned filters.


@pytest.mark.slow
def test_pins_of_two_layers_are_compared(anywhere: Visit) -> None:
    page = anywhere("layers/conv/index.html")
    press(page, "ArrowRight", "ArrowRight", "p")
    page.locator("#grid li[data-n='20']").hover()
    page.get_by_role("button", name="Pin filter 20", exact=True).click()
    assert pinned(page) == ["conv:1", "conv:20"]
    page.locator("nav.beside a").click()
    page.wait_for_url("**%253Cscript%253E*/index.html#pins=*")
    page.locator("#grid a").nth(5).click()
    page.wait_for_url("**/5.html#*")
    press(page, "p")
    assert pinned(page) == ["conv:1", "conv:20", f"{HOSTILE}:5"]
    assert images_load(page, "#pin-list img")
    page.reload()
    assert len(pinned(page)) == 3
    press(page, "c")
    page.wait_for_url("**/compare.html#pins=*")
    titles = page.locator("#compared h2")
    titles.nth(2).wait_for()
    assert titles.all_inner_texts() == ["conv:1", "conv:20", f"{HOSTILE}:5"]
    assert images_load(page, "#compared img")
    tops = page.locator("#compared > li").evaluate_all("items => items.map(i => i.getBoundingClientRect().top)")
    assert len(set(tops)) == 1
    deep = anywhere(page.url.removeprefix(anywhere.site.url))
    deep.locator("#compared h2").nth(2).wait_for()
    page.get_by_role("button", name="Unpin conv:20").click()
    page.wait_for_function("document.querySelectorAll('#compared > li').length === 2")
    assert titles.all_inner_texts() == ["conv:1", f"{HOSTILE}:5"]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == f"Unpin {HOSTILE}:5"
    titles.nth(0).get_by_role("link").click()
    assert page.locator("h1").inner_text() == "conv:1"
    assert page.locator(".heading .pin").get_attribute("aria-pressed") == "true"
    press(page, "p")
    assert pinned(page) == [f"{HOSTILE}:5"]
    page.get_by_role("button", name="Unpin all").click()
    assert page.locator("#pins").is_hidden()


@pytest.mark.slow
def test_pins_survive_going_back_in_the_history(anywhere: Visit) -> None:
    page = anywhere("layers/conv/index.html")
    page.locator("#grid a").nth(4).click()
    wait_for_url_ending(page, "/4.html")
    press(page, "p")
    assert pinned(page) == ["conv:4"]
    page.go_back()
    page.locator("#pin-list img").wait_for()
    assert pinned(page) == ["conv:4"]
    press(page, "p")
    page.get_by_role("button", name="Unpin all").click()
    page.go_forward()
    page.wait_for_function("document.getElementById('pins').hidden")
    fresh = page.context.new_page()
    fresh.goto(f"{anywhere.site.url}layers/conv/index.html")
    assert fresh.locator("#pins").is_hidden(), "a new URL without pins pins nothing"


@pytest.mark.slow
def test_malformed_and_unknown_pins_are_ignored(visit: Visit) -> None:
    malformed = "*".join(
        ["%2525E0%2525A4%2525A", "..", "..%252F..:1", "nothing:4", "conv:x", "conv:99999", ":", "conv:7", "conv:7"]
    )
    page = visit(f"compare.html#pins={malformed}&sort=%E0%A4%A&theme=%22%3E&__proto__=1")
    page.locator("#compared h2").wait_for()
    assert page.locator("#compared h2").all_inner_texts() == ["conv:7"]
    page.get_by_role("button", name="Unpin all").click()
    assert page.locator("#compared > li").count() == 0
    assert "Pin filters" in page.locator("#said").inner_text()


@pytest.mark.slow
def test_pins_missing_from_the_gallery_are_shown_by_name(visit: Visit) -> None:
    pins, missing = "pins=conv:1*conv:99*gone:4", f"{visit.site.url}layers/gone/thumbs/4.webp"
    page = visit(f"layers/conv/index.html#{pins}")
    names = page.locator("#pin-list span")
    names.nth(1).wait_for()
    page.locator("#theme").click()
    assert names.all_inner_texts() == ["conv:99", "gone:4"]
    assert pinned(page) == ["conv:1"]
    page.goto(f"{visit.site.url}index.html#{pins}")
    assert names.all_inner_texts() == ["conv:99", "gone:4"]
    assert images_load(page, "#pin-list img")
    assert not [url for url in visit.requested if url.endswith("conv/thumbs/99.webp")], (
        "the data of its layer shows that it is missing"
    )
    assert visit.requested.count(missing) == 1, "requested once, by the page without data of all layers"
    visit.problems = [line for line in visit.problems if missing not in line and "ERR_FILE_NOT_FOUND" not in line]


# Contents of the pages.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("anywhere", "layer"),
    [("file", HOSTILE), ("file", QUOTED), ("file", LONG), ("http", QUOTED)],
    ids=["file-hostile", "file-quoted", "file-long", "http-quoted"],
    indirect=["anywhere"],
)
def test_special_characters_in_layer_names(anywhere: Visit, layer: str) -> None:
    page = anywhere()
    page.get_by_role("link", name=layer, exact=True).click()
    wait_for_url_ending(page, f"{folder_url(layer)}/index.html")
    assert page.locator("h1").inner_text() == layer
    assert grid(page) == list(range(LAYERS[layer]))
    assert images_load(page, "#grid img")
    page.locator("#grid a").nth(1).click()
    wait_for_url_ending(page, "/1.html")
    assert page.title() == f"{layer}:1 – {MODEL}"
    assert images_load(page, ".views img")
    press(page, "p")
    (name,) = pinned(page)
    assert name == f"{layer}:1" or (layer == LONG and name.startswith("trunk."))
    assert images_load(page, "#pin-list img")
    press(page, "c")
    page.locator("#compared h2").wait_for()
    assert page.locator("#compared h2").all_inner_texts() == [f"{layer}:1"]
    assert images_load(page, "#compared img")
    assert page.locator("#compared img.map").count() == (layer != LONG)


@pytest.mark.slow
def test_damaged_and_missing_units_are_reported(visit: Visit) -> None:
    page = visit()
    assert page.locator(".problems summary").inner_text() == "1 part left out"
    assert folder_of(DAMAGED) in page.locator(".problems li").inner_text()
    page.get_by_role("link", name=DAMAGED, exact=True).click()
    wait_for_url_ending(page, f"{folder_url(DAMAGED)}/index.html")
    assert grid(page) == [0, 1]
    assert "2 of 6 filters" in page.locator("main").inner_text()
    page.goto(f"{visit.site.url}layers/{folder_url(EMPTY)}/index.html")
    assert "No filter of this layer has been rendered yet." in page.locator("main").inner_text()


@pytest.mark.slow
def test_slider_shows_the_snapshots(web: Visit) -> None:
    page = web(PAGES["filter"])
    positions = []
    slider = page.get_by_role("slider")
    slider.focus()
    for key in ("ArrowLeft", "ArrowLeft", "End"):
        positions.append(
            (page.locator("output").inner_text(), page.locator(".frame img").evaluate("i => i.style.left"))
        )
        press(page, key)
    assert positions == [("5", "-200%"), ("2", "-100%"), ("0", "0%")]
    assert slider.get_attribute("aria-valuetext") == "after step 5"
    width, height = page.locator(".frame").evaluate("f => [f.clientWidth, f.clientHeight]")
    assert width / height == pytest.approx(40 / 24, rel=0.02)
    assert "/3.html" in page.url, "arrow keys on the slider do not navigate"
    with page.expect_download() as download:
        page.get_by_role("link", name="WEBP").click()
    assert download.value.suggested_filename == "3-moving.webp"
    assert download.value.path().read_bytes()[8:12] == b"WEBP"


@pytest.mark.slow
def test_copied_command_and_python_call_are_valid(web: Visit) -> None:
    page = web(PAGES["filter"], permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy the command").click()
    page.get_by_text("Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    program, *words = shlex.split(command)
    assert program == "featvis"
    parsed = cli._parser().parse_args(words)
    assert (parsed.model, parsed.layer, parsed.filters, parsed.steps, parsed.seed) == (MODEL, HOSTILE, "3", 5, 7)
    page.get_by_role("button", name="Copy the Python call").click()
    page.wait_for_function("document.querySelectorAll('.copy')[1].textContent === 'Copied'")
    compile(page.evaluate("navigator.clipboard.readText()"), "call", "exec")


@pytest.mark.slow
def test_theme_follows_the_system_until_one_is_chosen(visit: Visit) -> None:
    def background(page: Any) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page = visit("layers/conv/index.html", color_scheme="dark")
    dark = background(page)
    page.emulate_media(color_scheme="light")
    light = background(page)
    assert light != dark
    page.get_by_role("button", name="Dark").click()
    assert background(page) == dark
    page.locator("#grid a").first.click()
    wait_for_url_ending(page, "0.html#theme=dark")
    assert background(page) == dark
    page.get_by_role("button", name="Light").click()
    page.go_back()
    page.wait_for_function("dark => getComputedStyle(document.body).backgroundColor !== dark", arg=dark)


@pytest.mark.slow
def test_pages_work_without_javascript(visit: Visit) -> None:
    page = visit(java_script_enabled=False)
    assert page.locator(".scripted:visible").count() == 0
    page.get_by_role("link", name="wide", exact=True).click()
    wait_for_url_ending(page, "wide/index.html")
    assert page.locator("#grid > li").count() == 500
    page.locator("#pager a").last.click()
    wait_for_url_ending(page, "page-3.html")
    assert page.locator("#grid > li").count() == FILTERS - 1000
    page.locator("#grid a").last.click()
    assert page.locator("h1").inner_text() == "wide:1009"
    assert "Score" in page.locator(".facts").inner_text()
    page.locator("#before").click()
    wait_for_url_ending(page, "1008.html")
    page.goto(visit.site.url + "compare.html")
    assert "needs JavaScript" in page.locator("noscript").inner_text()


@pytest.mark.slow
def test_touch_pins_and_swipes(visit: Visit) -> None:
    page = visit("layers/conv/index.html", width=390, height=700, has_touch=True, is_mobile=True)
    star = page.locator("#grid li[data-n='1'] .pin")
    assert star.evaluate("s => getComputedStyle(s).opacity") == "1"
    box = star.bounding_box()
    assert min(box["width"], box["height"]) >= 24
    star.tap()
    assert pinned(page) == ["conv:1"]
    page.locator("#grid a").nth(1).tap()
    wait_for_url_ending(page, "/1.html#pins=conv:1")
    for start, end, target in ((300, 60, "/2.html"), (60, 300, "/1.html")):
        swipe(page, start, end)
        wait_for_url_ending(page, f"{target}#pins=conv:1")


def swipe(page: Any, start: float, end: float) -> None:
    """Swipe from one x to another, again if Chromium dropped the touches, as it does before a page is drawn."""
    session = page.context.new_cdp_session(page)
    touches = [[{"x": start + (end - start) * i / 4, "y": 300}] for i in range(5)]
    arrived: list[str] = []
    page.expose_function(f"swiped{start}", lambda text: arrived.append(text))
    page.evaluate(f"addEventListener('touchend', () => swiped{start}(''))")
    while not arrived:
        page.wait_for_timeout(100)
        for kind, points in zip(("Start", *["Move"] * 4, "End"), (*touches, []), strict=True):
            session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
        page.wait_for_timeout(100)  # in which the call arrives


# Images of any number of channels, videos and signals.


@pytest.fixture(scope="module")
def shown(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    return {kind: shown_site(folder / kind, kind) for kind in ("six", "video", "signal")}


@pytest.fixture
def open_kind(browser: Any, shown: dict[str, Path]) -> Iterator[Any]:
    """Function from a kind of images to a visit of their gallery."""
    visits: list[Visit] = []

    def opener(kind: str) -> Visit:
        visits.append(Visit(browser, Site(shown[kind], f"{shown[kind].as_uri()}/")))
        return visits[-1]

    yield opener
    for visit in visits:
        visit.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["six", "video", "signal"])
def test_pages_show_every_kind_of_image(open_kind: Any, kind: str) -> None:
    visit = open_kind(kind)
    paths = ("index.html", "layers/conv/index.html", "layers/conv/1.html", "compare.html#pins=conv:1*conv:2")
    for path in paths:
        page = visit(path)
        if path.startswith("compare"):
            page.locator("#compared h2").nth(1).wait_for()
        assert images_load(page, "main img")
        for width in (320, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            content, window = page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert content <= window, f"{path} at {width}"
        # Nothing is distorted: but for enlarged maps, an image has the shape of its file.
        shapes = page.locator("main img:not(.map)").evaluate_all(
            "images => images.map(i => [i.clientWidth / i.clientHeight, i.naturalWidth / i.naturalHeight])"
        )
        assert all(shown == pytest.approx(natural, rel=0.03) for shown, natural in shapes), path
    page = visit("layers/conv/index.html")
    assert page.locator("#grid li").nth(10).inner_text().split() == ["10", "flat", "★"]
    assert "1 dead, 1 flat" in page.locator("main").inner_text()
    page.get_by_label("flat and dead filters").uncheck()
    assert grid(page) == [*range(9), 11]
    assert page.locator("#said").inner_text() == "2 flat or dead filters hidden"
    page.goto(f"{visit.site.url}layers/conv/10.html")
    assert "never rose above that of step 0" in page.locator(".note").inner_text()


@pytest.mark.slow
def test_captions_say_what_is_shown(open_kind: Any) -> None:
    expected = {
        "six": ["Image, 32 × 32 pixels; channels 5, 4, 3 of 6 as red, green, blue", "Activation map, 5 × 5, "],
        "video": ["Video, 5 frames of 32 × 32 pixels", "Activation maps of 4 time steps, each 5 × 5, "],
        "signal": [
            "Signal, 250 samples; 3 channels as lines from 0 to 1, channel 0 on top",
            "Activation at 62 positions, ",
        ],
    }
    for kind, captions in expected.items():
        text = open_kind(kind)("layers/conv/1.html").locator(".views").inner_text()
        for caption in captions:
            assert caption in text
    settings = open_kind("six")().locator("main details").text_content()
    assert "channels 5, 4, 3 of 6 as red, green, blue" in settings


def playing(page: Any) -> list[str]:
    """Return which files the videos of a page show, and the labels of their buttons."""
    sources = page.locator(".video img").evaluate_all("images => images.map(i => i.currentSrc.split('/').at(-2))")
    return [*sources, *page.locator(".video .play").all_inner_texts()]


@pytest.mark.slow
def test_videos_play_and_can_be_paused(open_kind: Any) -> None:
    page = open_kind("video")("layers/conv/1.html")
    assert images_load(page, ".video img")
    assert playing(page) == ["videos", "Pause"]
    page.get_by_role("button", name="Pause the video of conv:1").click()
    assert images_load(page, ".video img")
    assert playing(page) == ["images", "Play"]
    page.get_by_role("button", name="Play the video of conv:1").click()
    assert images_load(page, ".video img")
    assert playing(page) == ["videos", "Pause"]
    page = open_kind("video")("compare.html#pins=conv:1*conv:2")
    page.locator("#compared h2").nth(1).wait_for()
    assert images_load(page, ".video img")
    page.get_by_role("button", name="Pause the video of conv:2").click()
    assert images_load(page, ".video img")
    assert playing(page) == ["videos", "images", "Pause", "Play"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
def test_videos_stand_still_where_less_motion_is_wanted(open_kind: Any, script: bool) -> None:
    for motion, expected in (("reduce", "images"), ("no-preference", "videos")):
        visit = open_kind("video")
        page = visit("layers/conv/1.html", reduced_motion=motion, java_script_enabled=script)
        page.wait_for_load_state("load")
        requested = {url.split("/")[-2] for url in visit.requested if url.endswith("/1.webp")} & {"images", "videos"}
        assert requested == {expected}
        assert page.locator(".play").is_visible() == script
        if script:
            assert playing(page) == [expected, "Play" if motion == "reduce" else "Pause"]
            page.locator(".play").click()
            assert images_load(page, ".video img")
            assert playing(page)[0] == ({"images", "videos"} - {expected}).pop()


@pytest.mark.slow
def test_slider_shows_snapshots_of_signals_and_videos(open_kind: Any) -> None:
    for kind in ("signal", "video"):
        page = open_kind(kind)("layers/conv/1.html")
        page.get_by_role("slider").focus()
        press(page, "ArrowLeft")
        assert page.locator(".frame img").evaluate("i => i.style.left") == "-100%"
        frame, image = page.locator(".frame").bounding_box(), page.locator(".frame img").bounding_box()
        assert image["width"] == pytest.approx(3 * frame["width"], rel=0.01)
        assert image["height"] == pytest.approx(frame["height"], abs=2)


# Layout, accessibility and size.


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAGES)
def test_pages_fit_the_width_of_the_window(visit: Visit, kind: str) -> None:
    long_name = PAGES[kind].replace(folder_url(HOSTILE), folder_url(LONG))
    for path in dict.fromkeys([PAGES[kind], long_name]):
        page = visit(path, width=320)
        for width in (320, 768, 1440, 2560):
            page.set_viewport_size({"width": width, "height": 800})
            content, window = page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert content <= window, f"{path} at {width}"
        assert page.locator("header").evaluate("h => h.offsetHeight") < 120


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", PAGES)
def test_axe_finds_no_serious_accessibility_violations(visit: Visit, kind: str, theme: str) -> None:
    try:
        axe = importlib.import_module("axe_playwright_python.sync_playwright").Axe()
    except ImportError:
        pytest.skip("no axe-playwright-python: pip install 'featvis-func[test]'")
    page = visit(PAGES[kind], color_scheme=theme)
    if kind == "compare":
        page.locator("#compared h2").nth(1).wait_for()
    elif kind != "model":
        press(page, "ArrowDown", "p")  # shows the bar of pinned filters
    for width in (1280, 320) if theme == "light" else (1280,):
        page.set_viewport_size({"width": width, "height": 800})
        for violation in axe.run(page, options={"preload": False}).response["violations"]:
            elements = [node["html"] for node in violation["nodes"]][:3]
            details = (violation["id"], violation["help"], elements, width)
            assert violation["impact"] not in ("serious", "critical"), details


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["six", "video", "signal"])
def test_axe_finds_no_serious_violations_of_any_kind_of_image(open_kind: Any, kind: str) -> None:
    try:
        axe = importlib.import_module("axe_playwright_python.sync_playwright").Axe()
    except ImportError:
        pytest.skip("no axe-playwright-python: pip install 'featvis-func[test]'")
    for path in ("layers/conv/1.html", "compare.html#pins=conv:1*conv:2"):
        page = open_kind(kind)(path)
        page.wait_for_load_state("load")
        for violation in axe.run(page, options={"preload": False}).response["violations"]:
            elements = [node["html"] for node in violation["nodes"]][:3]
            assert violation["impact"] not in ("serious", "critical"), (violation["id"], violation["help"], elements)


@pytest.mark.slow
def test_first_view_of_500_filters_loads_less_than_1_mb(browser: Any, folder: Path, server: str) -> None:
    folder.mkdir(exist_ok=True)
    visit = Visit(browser, Site(heavy_site(folder / "heavy"), f"{server}heavy/"))
    page = visit("layers/conv/index.html", width=1440, height=900)
    page.wait_for_load_state("networkidle")
    size = transferred_bytes(page)
    print(f"first view: {size} bytes, {len(visit.requested)} files")
    assert images_load(page, "#grid li:nth-child(-n+40) img")
    assert size < 1_000_000
    page.mouse.wheel(0, 20_000)
    page.wait_for_function("document.querySelector('#grid li:last-child img').naturalWidth")
    visit.close()


def transferred_bytes(page: Any) -> int:
    """Return the number of bytes that the page has transferred, including headers."""
    kinds = "['navigation', 'resource'].flatMap(kind => performance.getEntriesByType(kind))"
    return page.evaluate(f"{kinds}.reduce((sum, entry) => sum + entry.transferSize, 0)")
