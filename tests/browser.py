"""A real browser for the tests of pages: Debian's Chromium, with nothing it would fetch by itself, and axe-core."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
_QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def opened(address: str, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """The page at an address, and what was said on its console or asked of anything but the page's own file.

    Parameters
    ----------
    options
        Of playwright's browser context: ``viewport``, ``color_scheme``, ``java_script_enabled``.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here; install Debian's package to run the tests of pages")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here; it is in the extra dev")
    with tempfile.TemporaryDirectory() as profile, playwright.sync_playwright() as it:
        context = it.chromium.launch_persistent_context(profile, executable_path=chromium, args=_QUIET, **options)
        page, heard = context.pages[0], []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.on("request", lambda asked: None if asked.url.startswith("data:") else heard.append(asked.url))
        page.goto(address)
        heard.remove(address)
        yield page, heard
        context.close()


def violations(page: Any) -> list[str]:
    """Serious and critical findings of axe-core on an opened page, which needs its scripts on."""
    if not AXE.is_file():
        pytest.skip(f"{AXE} is not there; `make browser` fetches it from npm")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{its['id']}: {its['help']} ({its['nodes'][0]['html'][:120]})"
        for its in found
        if its["impact"] in ("serious", "critical")
    ]
