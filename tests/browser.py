"""Debian's Chromium without a window: opens pages, and keeps what they write to the console."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def open_chromium() -> Iterator[object]:
    """Yield Playwright's browser over the Debian package `chromium`, or skip the test."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    # Chromium refuses to run as root inside its sandbox.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser, url: str, **settings) -> Iterator[tuple[object, list[str]]]:
    """Yield a page of the URL and the list of its errors, which grows while it is open.

    Args:
        browser: Of `open_chromium`.
        url: http:// or file://.
        settings: Of Playwright's `new_page`, as color_scheme="dark" or offline=True.
    """
    page = browser.new_page(**settings)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("requestfailed", lambda request: errors.append(f"{request.url}: {request.failure}"))
    try:
        page.goto(url)
        yield page, errors
    finally:
        page.close()
