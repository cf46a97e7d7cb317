"""What the pages have in common: chapters, tables, colours by day, by night and on paper, and a strict policy.

A page is one HTML file that asks the network for nothing. Its policy allows the style it carries by its digest, so that
nothing that gets into a page (a gene, a file name) could bring a style, a script or an address of its own.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined


class Table(NamedTuple):
    """A table as plain text, not yet escaped; the first column names its rows."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    muted: frozenset[int] = frozenset()
    """Numbers of rows that rank nowhere."""
    marks: Mapping[str, str] = {}
    """First word of a cell -> its colour, ``"good"``, ``"fair"`` or ``"bad"``: no colour stands without its word."""

    @property
    def are_text(self) -> list[bool]:
        """Whether each column is words: then it is set flush left."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.headers)
        return [place == 0 or any(map(str.isalpha, "".join(cells))) for place, cells in enumerate(columns)]

    def mark(self, cell: str) -> str:
        """The colour of a cell, or ""."""
        return self.marks.get(cell.split(" ")[0], "")


class Picture(NamedTuple):
    """A picture that the page carries in itself."""

    address: str
    """``data:`` and the picture's bytes."""
    shows: str
    """What a reader who does not see it is told."""
    caption: str = ""
    wide: bool = False
    """Kept readable on a narrow screen, where one then scrolls along it."""


class Part(NamedTuple):
    """A chapter of a page, as plain text; ``warnings`` stand out, ``folded`` is a table to be opened."""

    title: str
    warnings: Sequence[str] = ()
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()
    folded: Table | None = None
    items: Sequence[str] = ()


def document(title: str, body: str, *, style: str = "", script: str = "", images: str = "") -> str:
    """A whole page.

    Parameters
    ----------
    title
        Plain text; it is escaped here.
    body
        HTML of what stands in ``<main>``, every name in it escaped.
    style, script
        What this page has beside the common style.
    images
        Sources of pictures that the policy allows, such as ``"data:"``; none where empty.
    """
    style = template_text("page.css") + style
    policy = f"default-src 'none'; style-src {_digest(style)}; "
    policy += f"script-src {_digest(script)}; " if script else ""
    policy += f"img-src {images}; " if images else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}base-uri 'none'; form-action 'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style>\n</head>\n<body>\n<main>",
            body,
            "</main>",
            *([f"<script>{script}</script>"] if script else []),
            "</body>\n</html>\n",
        ]
    )


def chapters(parts: Sequence[Part]) -> str:
    """Chapters as HTML for the body of :func:`document`, everything in them escaped; the first has the page's title."""
    return _templates().get_template("chapters.html").render(parts=parts)


def template_text(name: str) -> str:
    """A file of ``templates`` as it is."""
    environment = _templates()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("hifusion"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
