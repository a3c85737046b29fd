"""The browser of the gallery's tests, the folder of the sites that it visits, and a folder of photographs."""

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        api = importlib.import_module("playwright.sync_api")
    except ImportError:
        pytest.skip("no playwright: pip install 'featvis-func[test]'")
    path = os.environ.get("FEATVIS_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: neither FEATVIS_CHROMIUM nor one of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parent folder of all sites. Depends on the browser, so that no site is built when the tests are skipped."""
    return tmp_path_factory.mktemp("sites") / "sub folder é#"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Folder of twelve images of one colour each, from blue to red, and a text file."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(12):
        PIL.Image.new("RGB", (20, 16), (20 * i, 10, 255 - 20 * i)).save(folder / f"image-{i:02d}.png")
    (folder / "notes.txt").write_text("mine")
    return folder
