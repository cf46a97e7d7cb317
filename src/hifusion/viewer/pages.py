"""Every file of the page by its address, made when asked for: what the server answers and what a copy holds."""

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hifusion.viewer.content import QUPATH_KINDS, contents_of
from hifusion.viewer.deepzoom import TilePyramid, pyramid_of
from hifusion.viewer.gathering import gather

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
    ".geojson": "application/geo+json",
    ".bin": "application/octet-stream",
    ".jpeg": "image/jpeg",
}
MOST_OPEN = 3  # slides whose pixels are kept: a JPEG of a section is decoded whole, which takes 300 MB


class Site:
    """The page of some sections.

    Parameters
    ----------
    sources
        See :func:`hifusion.viewer.gathering.gather`.
    genes
        The only genes to show; all where None.
    most_px
        Longest side of the slide at its finest; the slide's own where None.
    """

    def __init__(self, sources: Sequence[Path], genes: Sequence[str] | None = None, most_px: int | None = None) -> None:
        self.contents = contents_of(gather(sources), genes)
        slides = [pyramid_of(content.spots, most_px) for content in self.contents]
        self._pyramids, self._notes = [pyramid for pyramid, _ in slides], [note for _, note in slides]
        self._used: list[TilePyramid] = []

    def warm(self) -> None:
        """Make what the first view needs before anybody asks for it."""
        if self._pyramids[0] is not None:
            self._pyramids[0].warm()

    def sections(self) -> bytes:
        """``data/sections.json``."""
        return _json({"sections": [content.summary() for content in self.contents]})

    def section(self, number: int) -> bytes:
        """``data/i/section.json``."""
        pyramid = self._pyramids[number]
        return _json(
            self.contents[number].facts()
            | {"slide": pyramid.facts() if pyramid else None, "slide_note": self._notes[number]}
        )

    def spots(self, number: int) -> bytes:
        """``data/i/spots.json``."""
        return _json(self.contents[number].spot_facts())

    def tile(self, number: int, level: int, column: int, row: int) -> bytes | None:
        """``data/i/tiles/level/column_row.jpeg``; None where there is none."""
        pyramid = self._pyramids[number]
        if pyramid is None:
            return None
        if not self._used or self._used[-1] is not pyramid:
            self._used = [one for one in self._used if one is not pyramid] + [pyramid]
            for stale in self._used[:-MOST_OPEN]:
                stale.close()
            self._used = self._used[-MOST_OPEN:]
        return pyramid.tile(level, column, row)

    def count(self) -> int:
        """How many files :meth:`files` gives."""
        tiles = (
            columns * rows
            for pyramid in self._pyramids
            if pyramid
            for columns, rows in map(pyramid.grid, range(pyramid.finest + 1))
        )
        maps = [its for content in self.contents for its in content.maps]
        values = sum(its.blocks + (its.kind in QUPATH_KINDS) for its in maps)
        return len(assets()) + 1 + 3 * len(self.contents) + values + sum(tiles)

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Every file of the page, address and content, tiles last."""
        yield from assets().items()
        yield "data/sections.json", self.sections()
        for i, content in enumerate(self.contents):
            yield f"data/{i}/section.json", self.section(i)
            yield f"data/{i}/spots.json", self.spots(i)
            yield f"data/{i}/centres.bin", content.centres()
            for m, its in enumerate(content.maps):
                for b in range(its.blocks):
                    yield f"data/{i}/{m}/{b}.bin", its.block(b)
                if its.kind in QUPATH_KINDS:
                    yield f"data/{i}/{m}.geojson", content.geojson(m)
            yield from self._tiles(i)

    def _tiles(self, number: int) -> Iterator[tuple[str, bytes]]:
        pyramid = self._pyramids[number]
        if pyramid is None:
            return
        for level in range(pyramid.finest + 1):
            columns, rows = pyramid.grid(level)
            for column, row in ((x, y) for y in range(rows) for x in range(columns)):
                tile = self.tile(number, level, column, row)
                assert tile is not None, "the grid says that it is there"
                yield f"data/{number}/tiles/{level}/{column}_{row}.jpeg", tile
        pyramid.close()


def assets() -> dict[str, bytes]:
    """Name -> content of the page's own files, which are the same for all sections."""
    folder = resources.files("hifusion.viewer") / "static"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in KINDS}


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
