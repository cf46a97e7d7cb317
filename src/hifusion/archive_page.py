"""What came of an archive of slides: one table, and one page to look at, failed slides first."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from hifusion import files
from hifusion.pages import document
from hifusion.slide_jobs import DONE, FAILED, LEFT, PICTURES, SlideJob, thumbnail


class Column(NamedTuple):
    """A column of the table: its title on the page, and its decimals; None for words."""

    title: str
    decimals: int | None = None


COLUMNS: dict[str, Column] = {
    "slide": Column("file"),
    "name": Column("slide"),
    "state": Column("state"),
    "reason": Column("reason"),
    "spots": Column("spots", 0),
    "genes": Column("genes", 0),
    "tissue_mm2": Column("tissue, mm²", 2),
    "mpp": Column("µm per px", 3),
    "novel_share": Column("novel spots", 2),
    "spots_per_s": Column("spots/s", 1),
    "seconds": Column("seconds", 1),
    "attempts": Column("attempts", 0),
    "warning": Column("warning"),
}
_ORDER = (FAILED, LEFT, DONE)  # what is to be looked at comes first

_STYLE = """
thead button { all: unset; cursor: pointer; font-weight: 600; text-decoration: underline dotted; }
thead button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
.text { max-width: 26rem; overflow-wrap: anywhere; }
thead .text { white-space: nowrap; }
td.name, td.state { min-width: 5rem; }
td.reason:not(:empty), td.warning:not(:empty) { min-width: 18rem; }
.failed .state, .failed .reason { background: var(--bad); }
.left .state { color: var(--dim); }
td.warning:not(:empty) { background: var(--warn); }
img { max-width: 160px; max-height: 110px; display: block; }
@media print { body { font-size: 8pt; } }
"""

# Sorts by the column whose heading is pressed; numbers as numbers, what is empty last.
_SCRIPT = """
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = document.querySelector("tbody");
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.children[head.cellIndex].dataset.sort ?? row.children[head.cellIndex].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (!x || !y) return !x - !y;
    return (down ? -1 : 1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  });
  body.append(...rows);
});
"""


def archive_table(jobs: Sequence[SlideJob], states: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row a slide, in the manifest's order, with the columns of ``COLUMNS``.

    Parameters
    ----------
    states
        What :func:`hifusion.slide_jobs.do_slide` gave, by name; a slide that is not there is left to do.
    """
    rows = []
    for job in jobs:
        state = states.get(job.name, {"state": LEFT})
        told = {name: state.get(name) for name in COLUMNS}
        rows.append({**told, "slide": job.slide, "name": job.name})
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for name, column in COLUMNS.items():
        if column.decimals is None:
            table[name] = table[name].fillna("")
        else:
            table[name] = pd.to_numeric(table[name])
    return table.astype(dict.fromkeys(("spots", "genes", "attempts"), "Int64"))


def to_html(table: pd.DataFrame, run: str) -> str:
    """The page as one HTML file: no network, every name shown as text; light and dark; pictures lie beside it.

    Parameters
    ----------
    table
        From :func:`archive_table`.
    run
        Names the run in the heading.
    """
    shown = [name for name in COLUMNS if name != "slide"]
    ordered = table.assign(rank=table["state"].map(_ORDER.index)).sort_values("rank", kind="stable")
    counts = ", ".join(f"{(table['state'] == state).sum()} {state}" for state in _ORDER)
    body = [
        f"<h1>{len(table)} slides: {escape(counts)}</h1>",
        f"<p>Predicted by run {escape(run)}. Novel spots: share that is more unlike the training spots than 95 % "
        "of held-out ones; a low share is no promise that a prediction is right. A heading sorts.</p>",
        '<div class="scroll" role="region" aria-label="Slides" tabindex="0">\n<table>\n<thead><tr>',
        *(f'<th scope="col" class="text">{what}</th>' for what in PICTURES),
        *(
            f'<th scope="col"{_class(name)}><button type="button">{escape(COLUMNS[name].title)}</button></th>'
            for name in shown
        ),
        "</tr></thead>\n<tbody>",
        *(_row(row, shown) for _, row in ordered.iterrows()),
        "</tbody>\n</table>\n</div>",
    ]
    return document(f"Slides: {counts}", "\n".join(body), style=_STYLE, script=_SCRIPT, images="'self' file:")


def _row(row: "pd.Series[Any]", shown: Sequence[str]) -> str:
    name, state = str(row["name"]), str(row["state"])
    cells = [f'<tr class="{escape(state)}">']
    for what in PICTURES:
        whole, small = quote(f"slides/{name}/{what}.png"), quote(thumbnail(name, what))
        picture = (
            f'<a href="{escape(whole)}"><img src="{escape(small)}" alt="{what} of {escape(name)}" loading="lazy"></a>'
        )
        cells.append(f"<td>{picture if state == DONE else ''}</td>")
    for column in shown:
        text, value = _cell(row, column)
        if column == "name":
            text = f'<a href="{escape(quote(f"slides/{name}/"))}" title="{escape(str(row["slide"]))}">{text}</a>'
        cells.append(f'<td{_class(column)} data-sort="{escape(value)}">{text}</td>')
    return "".join([*cells, "</tr>"])


def _cell(row: "pd.Series[Any]", column: str) -> tuple[str, str]:
    """A cell as escaped text, and what it is sorted by."""
    value, decimals = row[column], COLUMNS[column].decimals
    if column == "state":
        return escape(str(value)), str(_ORDER.index(value))
    if decimals is None:
        return escape(str(value)), str(value)
    return ("", "") if pd.isna(value) else (f"{value:.{decimals}f}", f"{value}")


def _class(column: str) -> str:
    """Words are set flush left; some columns are coloured."""
    if COLUMNS[column].decimals is not None:
        return ""
    return f' class="text {column}"'


def write_page(out: Path, table: pd.DataFrame, run: str) -> None:
    """Leave ``slides.csv`` and ``index.html``."""
    files.write_text(out / "slides.csv", table.to_csv(index=False, lineterminator="\n"))
    files.write_text(out / "index.html", to_html(table, run))
