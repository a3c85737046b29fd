"""Visits of galleries in a headless browser, which fail on any failed request, message or error."""

import re
from pathlib import Path
from typing import Any, NamedTuple


class Site(NamedTuple):
    """Location of a gallery."""

    folder: Path
    url: str
    """URL of the folder, with a trailing slash."""


class Visit:
    """Opener of pages. Records failed requests, console messages and errors; :meth:`close` fails if there are any."""

    def __init__(self, browser: Any, site: Site) -> None:
        self.site = site
        self.problems: list[str] = []
        self.requested: list[str] = []
        self.browser = browser
        self._contexts: list[Any] = []

    def __call__(self, path: str = "index.html", *, width: int = 1280, height: int = 800, **options: Any) -> Any:
        """Open a page in a new browser context."""
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(300_000)  # only a guard against hanging
        self._contexts.append(context)
        context.on("request", self._on_request)
        context.on("requestfailed", self._on_failure)
        context.on("response", lambda r: r.status < 400 or self.problems.append(f"{r.status}: {r.url}"))
        context.on("console", lambda m: self.problems.append(f"console, {m.type}: {m.text}"))
        context.on("weberror", lambda e: self.problems.append(f"error: {e.error}"))
        page = context.new_page()
        page.on("dialog", self._on_dialog)
        page.goto(self.site.url + path)
        return page

    def _on_request(self, request: Any) -> None:
        self.requested.append(request.url)
        if not request.url.startswith((self.site.url, "data:")):
            self.problems.append(f"requested {request.url}")

    def _on_failure(self, request: Any) -> None:
        if "ERR_ABORTED" not in (request.failure or ""):  # aborted by leaving the page
            self.problems.append(f"failed: {request.url}, {request.failure}")

    def _on_dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        assert not self.problems


def grid(page: Any) -> list[int]:
    """Return the filters on a layer's page, in order."""
    return page.locator("#grid > li").evaluate_all("items => items.map(item => Number(item.dataset.n))")


def focused(page: Any) -> int:
    """Return the number of the filter that has the focus."""
    return page.evaluate("Number(document.activeElement.closest('li').dataset.n)")


def images_load(page: Any, selector: str) -> bool:
    """Wait until all images that match are loaded and decoded; return whether there is any."""
    loaded = "i => i.complete && i.naturalWidth && i.currentSrc.endsWith('.webp')"
    page.wait_for_function(f"s => [...document.querySelectorAll(s)].every({loaded})", arg=selector)
    return page.locator(selector).count() > 0


def pinned(page: Any) -> list[str]:
    """Return the names of the thumbnails in the bar of pinned filters."""
    return page.locator("#pin-list img").evaluate_all("images => images.map(image => image.alt)")


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def wait_for_url_ending(page: Any, text: str) -> None:
    """Wait until the URL ends with a text."""
    page.wait_for_url(re.compile(re.escape(text) + "$"))
