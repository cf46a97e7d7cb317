"""A synthetic cohort in the raw her2st layout: H&E-like tissue drawn by code, counts drawn from what one sees in it.

A spot's counts follow the area that each of four cell types (:mod:`hifusion.synth_tissue`) takes of its disc, so what
can be predicted is visible. Patients differ in stain and in a factor per gene, spots in depth; some genes (``NULL...``)
follow no cell type at all. A spot's label, as a pathologist's would be, is the type that takes most of its disc.
"""

import gzip
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from hifusion import files
from hifusion.errors import InputError
from hifusion.synth_tissue import CELL_TYPES, PITCH_UM, Canvas, cell_shares, draw_patient, draw_tissue, next_fields

SPOT_DIAMETER_UM = 100.0
FIRST_XY = (6, 9)  # array position of the upper left spot: her2st arrays do not start at 0 either
MARKERS = {
    "ERBB2": "tumour", "KRT19": "tumour", "MUC1": "tumour", "EPCAM": "tumour",
    "CD74": "immune", "TMSB10": "immune", "PTPRC": "immune", "HLA-DRA": "immune",
    "COL1A1": "stroma", "VIM": "stroma", "FABP4": "fat", "ADIPOQ": "fat",
}  # fmt: skip
SIZE_PX_MAX = 3000  # about 2 GB of memory while drawing
LIMITS: dict[str, tuple[int, int]] = {
    "patients": (1, 26),  # her2st names a patient by one letter
    "sections_per_patient": (1, 99),
    "spots_per_side": (4, 60),
    "genes": (20, 20_000),
    "seed": (0, 2**32 - 1),
    "pitch_px": (40, 400),  # below 40 px (5 um/px) nuclei cannot be told apart
    "margin_px": (10, 2000),
    "depth": (50, 1_000_000),
}

# UMI per area relative to tumour: fat is nearly empty, immune cells are small.
_RICHNESS = np.array([1.0, 0.9, 0.6, 0.35])
_DISPERSION = 0.03  # variance of the counts = mean + 0.03 mean^2


def write_cohort(
    root: Path,
    *,
    patients: int = 4,
    sections_per_patient: int = 2,
    spots_per_side: int = 12,
    genes: int = 60,
    seed: int = 0,
    pitch_px: int = 72,
    margin_px: int = 36,
    depth: int = 4000,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Draw a cohort into the new folder ``root`` and give the names of its sections (A1, A2, B1, ...).

    Beside the her2st layout the folder holds ``truth.csv`` (area share of each cell type in each spot, its depth) and
    ``README.txt``. Same arguments, same cohort; more patients or sections leave the first ones as they are.

    Parameters
    ----------
    root
        Folder to make; it must be absent or empty. It appears only when complete.
    spots_per_side
        Side of the square array in spots; those outside the tissue are left out.
    pitch_px
        Pixels between spots (200 um): 72 gives 2.8 um per pixel, and a spot is half as wide.
    margin_px
        Pixels from the outermost spot centres to the image's edge, at least a spot's radius. Small on purpose: region
        patches there reach over the edge.
    depth
        Counts (UMI) of a spot full of tumour, on average over spots.
    progress
        Called with (sections done, sections in all).

    Raises
    ------
    InputError
        An argument out of range, a ``root`` that holds something, or a disk that fills up.
    """
    root = Path(root)
    values = (patients, sections_per_patient, spots_per_side, genes, seed, pitch_px, margin_px, depth)
    given = dict(zip(LIMITS, values, strict=True))
    _check(given)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root}: is already there and not empty; give a new folder, or remove this one first")
    names, programmes = _gene_programmes(genes, np.random.default_rng([seed, 0]))
    sections: list[str] = []
    truth: list[list[object]] = [["section", "spot", *CELL_TYPES, "depth"]]
    part = root.with_name(f".{root.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a killed run left
        part.mkdir(parents=True)
        for p in range(patients):
            patient = draw_patient(genes, np.random.default_rng([seed, 1, p]))
            fields = None
            for s in range(sections_per_patient):
                section = f"{chr(ord('A') + p)}{s + 1}"
                canvas = Canvas(pitch_px, margin_px, spots_per_side, np.random.default_rng([seed, 2, p, s]))
                fields = next_fields(fields, canvas)
                shares, tissue = cell_shares(fields, patient, canvas)
                image = draw_tissue(shares, tissue, 1.2 * fields[-1], patient, canvas)
                spots = _place_spots(shares, tissue, canvas)
                counts, depths = _draw_counts(spots["share"], programmes * patient.gene_factors, depth, canvas.rng)
                _write_section(part / "data", section, image, spots, counts, names)
                for (x, y), share, own_depth in zip(spots["array"], spots["share"], depths, strict=True):
                    truth.append([section, f"{x}x{y}", *(f"{value:.4f}" for value in (*share, own_depth))])
                sections.append(section)
                if progress:
                    progress(len(sections), patients * sections_per_patient)
        _write_rows(part / "truth.csv", truth, ",")
        (part / "README.txt").write_text(_readme(given), encoding="utf-8")
        if root.exists():
            root.rmdir()
        part.rename(root)
    except OSError as error:
        files.raise_if_full(error, root)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sections


def _check(given: dict[str, int]) -> None:
    for name, value in given.items():
        low, high = LIMITS[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"{name}={value!r} cannot be drawn; use a whole number from {low} to {high}")
    if given["margin_px"] < (radius_px := given["pitch_px"] * SPOT_DIAMETER_UM / PITCH_UM / 2):
        raise InputError(f"margin_px={given['margin_px']} cuts spots off; use at least their radius, {radius_px:g}")
    side_px = (given["spots_per_side"] - 1) * given["pitch_px"] + 2 * given["margin_px"]
    if side_px > SIZE_PX_MAX:
        raise InputError(f"images would be {side_px} px wide, at most {SIZE_PX_MAX}; lower spots_per_side or pitch_px")


def _gene_programmes(genes: int, rng: Generator) -> tuple[list[str], np.ndarray]:
    """Names of the genes, and the share of counts that an area of each cell type gives each gene, ``(4, genes)``.

    One gene in eight is ``NULL`` (the same in every type; the first one well expressed, the rest weakly) and one in ten
    ``RARE`` (a type's own, but a count in few spots); the others are markers and ``SYN`` genes of one type or two.
    """
    n_null, n_rare = genes // 8, genes // 10
    markers = list(MARKERS.items())[: genes - n_null - n_rare]
    n_syn = genes - n_null - n_rare - len(markers)
    coded = {"SYN": n_syn, "RARE": n_rare, "NULL": n_null}
    names = [name for name, _ in markers] + [f"{kind}{i + 1:03d}" for kind, n in coded.items() for i in range(n)]
    own = [CELL_TYPES.index(kind) for _, kind in markers] + [i % len(CELL_TYPES) for i in range(n_syn + n_rare)]
    load = rng.uniform(0.04, 0.15, (len(CELL_TYPES), genes))
    load[own, np.arange(len(own))] = 1.0
    second = len(markers) + np.flatnonzero(rng.random(n_syn) < 0.25)
    load[rng.integers(len(CELL_TYPES), size=second.size), second] = 1.0
    load[:, len(own) :] = 0.5
    level = np.exp(rng.normal(0.0, 0.5, genes))
    level[: len(markers)] = np.maximum(level[: len(markers)], 1.0)  # markers are for maps: never the weak ones
    level[len(markers) + n_syn : len(own)] *= 0.001
    level[len(own) + 1 :] *= 0.05
    programmes = load * level
    return names, programmes / programmes.sum(axis=1, keepdims=True)


def _place_spots(shares: np.ndarray, tissue: np.ndarray, canvas: Canvas) -> dict[str, np.ndarray]:
    """Spots on tissue: (x, y) in ``array``, as printed (``new``), in ``pixel``; ``share`` of each type ``(N, 4)``."""
    n, first, last_px = canvas.spots_per_side, np.array(FIRST_XY), canvas.side_px - 1
    array = np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2)
    printed = array + np.clip(canvas.rng.normal(0.0, 0.02, array.shape), -0.05, 0.05)
    pixel = np.clip(canvas.margin_px + printed * canvas.pitch_px, canvas.margin_px, last_px - canvas.margin_px)
    radius_px = SPOT_DIAMETER_UM / 2 / canvas.mpp
    reach = np.arange(-int(radius_px) - 1, int(radius_px) + 2)
    rows, columns = reach[np.stack(np.nonzero(np.hypot(*np.meshgrid(reach, reach)) <= radius_px))]
    at = np.rint(pixel).astype(int)
    disc = np.clip(at[:, 1, None] + rows, 0, last_px), np.clip(at[:, 0, None] + columns, 0, last_px)
    covered = tissue[disc]
    on = covered.mean(axis=1) > 0.7
    areas = (shares[:, disc[0], disc[1]] * covered).sum(axis=2).T[on]
    share = areas / areas.sum(axis=1, keepdims=True)
    return {"array": (array + first)[on], "new": (printed + first)[on], "pixel": pixel[on], "share": share}


def _draw_counts(share: np.ndarray, programmes: np.ndarray, depth: int, rng: Generator) -> tuple[np.ndarray, ...]:
    """Negative binomial counts ``(N, G)`` and the spots' depth factors ``(N,)`` (log-normal, mean 1)."""
    depths = np.exp(rng.normal(-0.045, 0.3, len(share)))
    mean = depth * depths[:, None] * ((share * _RICHNESS) @ programmes)
    return rng.poisson(mean * rng.gamma(1 / _DISPERSION, _DISPERSION, mean.shape)), depths


def _write_section(
    data: Path, name: str, image: np.ndarray, spots: dict[str, np.ndarray], counts: np.ndarray, genes: list[str]
) -> None:
    table = [["", *genes], *([f"{x}x{y}", *row] for (x, y), row in zip(spots["array"], counts, strict=True))]
    _write_rows(data / "ST-cnts" / f"{name}.tsv.gz", table, "\t")
    head = ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
    rows = zip(spots["array"], spots["new"], spots["pixel"], strict=True)
    positions = [[*a, *(f"{v:.3f}" for v in n), *(f"{v:.2f}" for v in p), 1] for a, n, p in rows]
    _write_rows(data / "ST-spotfiles" / f"{name}_selection.tsv", [head, *positions], "\t")
    # As in her2st: rows named by pixels of another frame, y upwards, and array positions as printed, not whole.
    upright = np.abs(spots["pixel"] - [0.0, len(image)])
    head = ["Row.names", "x", "y", "pixel_x", "pixel_y", "label"]
    kinds = np.array(CELL_TYPES)[spots["share"].argmax(axis=1)]
    rows = zip(upright, spots["new"], kinds, strict=True)
    labels = [[f"{u[0]:.0f}x{u[1]:.0f}", *(f"{v:.3f}" for v in (*n, *u)), kind] for u, n, kind in rows]
    _write_rows(data / "ST-pat" / "lbl" / f"{name}_labeled_coordinates.tsv", [head, *labels], "\t")
    folder = data / "ST-imgs" / name[0] / name
    folder.mkdir(parents=True)
    Image.fromarray(image).save(folder / f"{name}.jpg", quality=92)


def _write_rows(path: Path, rows: Sequence[Sequence[object]], delimiter: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(delimiter.join(map(str, row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)  # no time: same table, same bytes


def _readme(given: dict[str, int]) -> str:
    return (
        "SYNTHETIC DATA, drawn by hifusion.synth.write_cohort: no patient, no tissue, no measurement.\n"
        "Layout as github.com/almaan/her2st. truth.csv: area share of each cell type in each spot, its depth.\n"
        "data/ST-pat/lbl: the cell type that takes most of each spot.\n"
        f"Pitch {PITCH_UM:g} um, spots {SPOT_DIAMETER_UM:g} um wide, {PITCH_UM / given['pitch_px']:.4f} um per pixel. "
        "Genes NULL... follow no cell type, RARE... are seen in few spots.\n\n"
        + "".join(f"{name} = {value}\n" for name, value in given.items())
    )
