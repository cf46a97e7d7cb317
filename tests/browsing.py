"""A real Chromium and the real command `hifusion view`, for tests of what somebody sees."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Nothing but the page itself: no graphics processor, no updates, no services of its maker.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; the test skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it is in the extra dev")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no {' or '.join(NAMES)} on the path; Debian's package is `chromium`")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def viewed(*paths: Path) -> Iterator[str]:
    """The address that `hifusion view` prints for these files, while it runs."""
    command = [sys.executable, "-m", "hifusion", "view", *map(str, paths)]
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        assert run.stdout is not None
        address = run.stdout.readline().strip()
        try:
            assert address.startswith("http://127.0.0.1:"), address + run.stdout.read()
            yield address
        finally:
            run.terminate()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder behind Python's own web server."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        try:
            yield run.stdout.readline().split("(")[1].split(")")[0]
        finally:
            run.terminate()


class Visit:
    """A page that is open, with all that it complained of and all that it asked for."""

    def __init__(self, browser: Any, address: str, start: str = "", **context: Any) -> None:
        self.address = address
        self.context = browser.new_context(viewport={"width": 1440, "height": 900}, **context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address + start)
        self.page.wait_for_selector("body[data-ready]")

    def until(self, script: str, seconds: float = 10.0) -> None:
        """Wait for an expression to hold: playwright's own way is forbidden by the page's policy."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(script):
            assert time.monotonic() < end, f"{script} did not hold within {seconds} s; {self.complaints}"
            self.page.wait_for_timeout(20)

    @property
    def foreign(self) -> list[str]:
        """Addresses asked for that are not under the page's own; blobs are made by the page itself."""
        return [url for url in self.asked if not url.startswith((self.address, f"blob:{self.address.split('/')[0]}"))]

    def first_view_ms(self) -> float:
        """From the start of the navigation to slide and spots drawn, by the browser's own clock."""
        return float(self.page.evaluate("performance.getEntriesByName('first-view')[0].startTime"))

    def pixels(self, view: int = 0) -> tuple[int, int]:
        """How many pixels of the spots of a view are drawn, and in how many colours."""
        script = """(n) => {
            const canvas = document.querySelectorAll('canvas.spots')[n];
            const { width, height } = canvas;
            const copy = Object.assign(document.createElement('canvas'), { width, height });
            const context = copy.getContext('2d', { willReadFrequently: true });
            context.drawImage(canvas, 0, 0);
            const image = context.getImageData(0, 0, width, height);
            const drawn = new Uint32Array(image.data.buffer).filter((pixel) => pixel >>> 24 === 255);
            return [drawn.length, new Set(drawn).size];
        }"""
        count, colours = self.page.evaluate(script, view)
        return count, colours

    def on_discs(self) -> tuple[float, float]:
        """How much of what is black on the slide is under a spot of the first view, and the other way round."""
        script = """() => {
            const [slide, spots] = ['.openseadragon-canvas canvas:not(.overlay)', 'canvas.spots'].map((selector) => {
                const { width, height } = document.querySelector('canvas.spots');
                const copy = Object.assign(document.createElement('canvas'), { width, height });
                const context = copy.getContext('2d', { willReadFrequently: true });
                context.drawImage(document.querySelector(selector), 0, 0, width, height);
                return context.getImageData(0, 0, width, height).data;
            });
            let [black, covered, both] = [0, 0, 0];
            for (let at = 0; at < slide.length; at += 4) {
                const is = slide[at + 3] > 0 && slide[at] < 90;
                const has = spots[at + 3] > 127;
                black += is; covered += has; both += is && has;
            }
            return [both / black, both / covered];
        }"""
        black_under_spot, spot_on_black = self.page.evaluate(script)
        return black_under_spot, spot_on_black

    def drag(self, *places: tuple[float, float], view: int = 0) -> None:
        """Press, move and release in a view; places are parts of its width and height."""
        box = self.page.locator(".stage").nth(view).bounding_box()
        x, y = zip(*[(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in places], strict=True)
        self.page.mouse.move(x[0], y[0])
        self.page.mouse.down()
        for place in zip(x[1:], y[1:], strict=True):
            self.page.mouse.move(*place, steps=4)
        self.page.mouse.up()

    def download(self, selector: str) -> Path:
        """The file that a button gives; its suggested name is kept."""
        with self.page.expect_download() as waiting:
            self.page.click(selector)
        given = waiting.value
        path = Path(given.path())
        return path.rename(path.with_name(given.suggested_filename))

    def close(self) -> None:
        self.context.close()
