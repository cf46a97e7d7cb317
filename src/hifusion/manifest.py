"""A list of slides as a CSV file, read and checked wholly before any work is done."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hifusion.errors import InputError, plain
from hifusion.section import refuse_unsafe_name

COLUMNS = ("slide", "name", "mpp", "mask", "lattice", "stride_um")
LATTICES = ("square", "hexagonal")
_MOST_NAME_BYTES = 200  # a name becomes that of a folder, of which most file systems take 255 bytes
_MOST_MPP = 100.0  # um per pixel: a spot is a pixel where it is coarser


@dataclass(frozen=True)
class SlideRow:
    """A row of a manifest.

    Attributes
    ----------
    name
        Unique in its manifest, and fit to be the name of a folder.
    slide, mask
        Files; relative ones were relative to the manifest's folder.
    mpp, lattice, stride_um
        As :func:`hifusion.slide_prediction.plan_slide` takes them; None where the manifest is silent.
    """

    name: str
    slide: Path
    mpp: float | None = None
    mask: Path | None = None
    lattice: str | None = None
    stride_um: float | None = None


def read_manifest(path: Path, most_stride_um: float = math.inf) -> list[SlideRow]:
    """The slides a manifest names, in its order. Whether their files are there is not looked at.

    Parameters
    ----------
    path
        CSV with a header; of ``COLUMNS`` only ``slide`` has to be there. Empty cells and empty lines count as absent.
    most_stride_um
        The training pitch of the run, beyond which no stride is possible.

    Raises
    ------
    InputError
        No such file, not a table, an unknown column, or a value that is not possible, with the number of its line.
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise InputError(f"{path}: names no slide; write a header ({','.join(COLUMNS)}) and a line for each slide")
    found: dict[str, SlideRow] = {}
    lines: dict[str, int] = {}  # by name without regard to case: some file systems do not tell cases apart
    for line, cells in rows:
        row = _row(cells, path.absolute().parent, f"{path}, line {line}", most_stride_um)
        if (same := row.name.casefold()) in lines:
            raise InputError(
                f"{path}, line {line}: the name {plain(row.name)!r} stands on line {lines[same]} too; give each slide "
                "a name of its own in the column name"
            )
        lines[same] = line
        found[row.name] = row
    return list(found.values())


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and filled cells by column of every row that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            rows = []
            for cells in reader:
                if len(cells) > len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: has {len(cells)} cells, the header has {len(header)}; put "
                        'text that holds a comma between "quotes"'
                    )
                if any(cell.strip() for cell in cells):
                    filled = zip(header, (cell.strip() for cell in cells), strict=False)  # cells may lack at the end
                    rows.append((reader.line_num, {name: cell for name, cell in filled if cell}))
            return rows
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such manifest; give a CSV file with a column slide") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV in UTF-8 ({plain(error)}); save it as such") from error


def _check_header(path: Path, header: list[str]) -> None:
    unknown = [name for name in header if name not in COLUMNS]
    twice = [name for name in header if header.count(name) > 1]
    if unknown or twice or "slide" not in header:
        wrong = (
            f"has an unknown column {plain(unknown[0])!r}"
            if unknown
            else f"has the column {twice[0]} twice"
            if twice
            else "has no column slide"
        )
        raise InputError(
            f"{path}: {wrong}; the first line names the columns, separated by commas: slide, and where wanted "
            f"{', '.join(COLUMNS[1:])}"
        )


def _row(cells: Mapping[str, str], root: Path, where: str, most_stride_um: float) -> SlideRow:
    if "slide" not in cells:
        raise InputError(f"{where}: names no slide; fill the column slide or delete the line")
    if any("\0" in cell for cell in cells.values()):
        raise InputError(f"{where}: holds a NUL character, which no path has; write the line anew")
    slide = root / cells["slide"]
    name = cells.get("name", slide.stem)
    refuse_unsafe_name(name, where)
    if len(name.encode()) > _MOST_NAME_BYTES:
        raise InputError(f"{where}: the name {plain(name)!r} is too long for a folder; give a shorter one")
    lattice = cells.get("lattice")
    if lattice not in (None, *LATTICES):
        raise InputError(
            f"{where}: lattice {plain(lattice)!r} is unknown; use {' or '.join(LATTICES)}, or leave it empty"
        )
    return SlideRow(
        name,
        slide,
        mpp=_number(cells, "mpp", where, _MOST_MPP),
        mask=root / cells["mask"] if "mask" in cells else None,
        lattice=lattice,
        stride_um=_number(cells, "stride_um", where, most_stride_um),
    )


def _number(cells: Mapping[str, str], column: str, where: str, most: float) -> float | None:
    if column not in cells:
        return None
    try:
        value = float(cells[column])
    except ValueError:
        value = math.nan
    if not (0 < value <= most and math.isfinite(value)):
        limit = f"above 0 and up to {most:g}" if math.isfinite(most) else "above 0"
        raise InputError(f"{where}: {column} {plain(cells[column])!r} is not possible; give a number {limit}")
    return value
