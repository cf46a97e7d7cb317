"""A synthetic cohort in the raw her2st layout: H&E-like tissue drawn by code, counts drawn from what one sees in it.

Four cell types fill a tissue: tumour (large pale nuclei, dense), immune (small round dark nuclei, packed), stroma (pink
fibres, few elongated nuclei) and fat (white round vacuoles). A spot's counts follow the area that each type takes of
its disc, so what can be predicted is visible. Patients differ in stain and in a factor per gene, spots in depth; some
genes (``NULL...``) follow no cell type at all.
"""

import gzip
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from hifusion import files
from hifusion.errors import InputError

PITCH_UM = 200.0
SPOT_DIAMETER_UM = 100.0
FIRST_XY = (6, 9)  # array position of the upper left spot: her2st arrays do not start at 0 either
CELL_TYPES = ("tumour", "immune", "stroma", "fat")
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
_MACRO_UM, _NEST_UM, _COARSE_UM, _FIBRE_UM = 520.0, 80.0, 20.0, 5.0
_TURNS = 16  # directions in which nuclei and vacuoles are drawn
# Optical density of haematoxylin (Ruifrok and Johnston 2001) and eosin (Macenko et al., ISBI 2009) in R, G, B.
_STAIN = np.array([[0.650, 0.704, 0.286], [0.216, 0.801, 0.558]])


@dataclass(frozen=True)
class _Nuclei:
    """One cell type's nuclei: spacing and half axes in um, darkness in optical density, how pale the middle is."""

    spacing_um: float
    length_um: float
    width_um: float
    darkness: float
    pale: float


_NUCLEI = {
    "tumour": _Nuclei(18.0, 8.0, 6.3, 1.15, 0.35),
    "immune": _Nuclei(9.5, 3.4, 3.2, 1.60, 0.0),
    "stroma": _Nuclei(30.0, 11.0, 2.3, 1.25, 0.0),
}
# Between the nuclei: (haematoxylin, eosin) of each type.
_GROUND = {"tumour": (0.20, 0.42), "immune": (0.16, 0.26), "stroma": (0.03, 0.30), "fat": (0.02, 0.34)}


@dataclass(frozen=True)
class _Patient:
    """What a patient's sections share."""

    stain: np.ndarray  # (2, 3): optical density of one unit of haematoxylin and of eosin in R, G, B
    background: np.ndarray  # (3,), 0..255
    gene_factors: np.ndarray  # (G,)
    outline: np.ndarray  # (2, 4): cosine and sine waves of the tissue's radius


@dataclass(frozen=True)
class _Canvas:
    """The geometry of a section (square array, square image, scale) and the random numbers it is drawn with."""

    pitch_px: int
    margin_px: int
    spots_per_side: int
    rng: Generator

    @property
    def side_px(self) -> int:
        return (self.spots_per_side - 1) * self.pitch_px + 2 * self.margin_px

    @property
    def mpp(self) -> float:
        return PITCH_UM / self.pitch_px

    def cells(self, cell_um: float) -> int:
        """Cells per side of a grid over the image whose cells are ``cell_um`` wide."""
        return max(4, int(np.ceil(self.side_px * self.mpp / cell_um)))

    def smooth(self, cell_um: float, scale_um: float) -> np.ndarray:
        """A random field on that grid, mean 0 and variance 1, with features about ``scale_um`` wide."""
        noise = self.rng.normal(size=(self.cells(cell_um),) * 2)
        field = np.asarray(ndimage.gaussian_filter(noise, scale_um / cell_um / 3.0, truncate=3.0))
        return np.asarray((field - field.mean()) / field.std())

    def enlarge(self, field: np.ndarray, side_px: int | None = None) -> np.ndarray:
        """A field resampled to the image's size, or to another."""
        size = (side_px or self.side_px,) * 2
        return np.asarray(Image.fromarray(field.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))


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
            patient = _draw_patient(genes, np.random.default_rng([seed, 1, p]))
            fields = None
            for s in range(sections_per_patient):
                section = f"{chr(ord('A') + p)}{s + 1}"
                canvas = _Canvas(pitch_px, margin_px, spots_per_side, np.random.default_rng([seed, 2, p, s]))
                fields = _next_fields(fields, canvas)
                shares, tissue = _cell_shares(fields, patient, canvas)
                image = _draw_tissue(shares, tissue, 1.2 * fields[-1], patient, canvas)
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


def _draw_patient(genes: int, rng: Generator) -> _Patient:
    stain = np.clip(_STAIN + rng.normal(0.0, 0.045, (2, 3)), 0.05, None)
    stain *= rng.uniform([[0.8], [0.6]], [[1.3], [1.05]]) / np.linalg.norm(stain, axis=1, keepdims=True)
    background = np.array([243.0, 238.0, 241.0]) + rng.uniform(-6.0, 6.0, 3)
    return _Patient(stain, background, np.exp(rng.normal(0.0, 0.4, genes)), rng.normal(0.0, 0.045, (2, 4)))


def _next_fields(before: np.ndarray | None, canvas: _Canvas) -> np.ndarray:
    """Fields of the next section, ``(5, n, n)``: one per cell type and the fibres' direction.

    They are those of the section before, bent by some 60 um and mixed with a tenth (of variance) of new ones.
    """
    fresh = np.stack([canvas.smooth(_COARSE_UM, _MACRO_UM) for _ in (*CELL_TYPES, "fibres")])
    if before is None:
        return fresh
    bend = np.stack([canvas.smooth(_COARSE_UM, 900.0) for _ in range(2)]) * 60.0 / _COARSE_UM
    at = np.mgrid[: bend.shape[1], : bend.shape[2]] + bend
    moved = np.stack([ndimage.map_coordinates(field, at, order=1, mode="nearest") for field in before])
    return np.asarray(np.sqrt(0.9) * moved + np.sqrt(0.1) * fresh)


def _cell_shares(fields: np.ndarray, patient: _Patient, canvas: _Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Share of each cell type at each pixel ``(4, side, side)``, and the tissue ``(side, side)``, both 0 to 1."""
    nests = np.stack([canvas.smooth(_COARSE_UM, _NEST_UM) for _ in CELL_TYPES])
    logits = 4.0 * (1.35 * fields[: len(CELL_TYPES)] + 0.55 * nests)
    logits[CELL_TYPES.index("fat")] -= 1.5
    large = np.stack([canvas.enlarge(logit) for logit in logits])
    weights = np.exp(large - large.max(axis=0))
    side = canvas.side_px
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    angle = np.arctan2(y, x)
    radius = 0.98 + canvas.enlarge(0.012 * canvas.smooth(10.0, 110.0) + 0.005 * canvas.smooth(10.0, 30.0))
    waves = patient.outline + canvas.rng.normal(0.0, 0.012, patient.outline.shape)
    for k, (cosine, sine) in enumerate(waves.T, start=2):
        radius = radius + cosine * np.cos(k * angle) + sine * np.sin(k * angle)
    inside = radius - (np.abs(x) ** 3 + np.abs(y) ** 3) ** (1 / 3)
    return weights / weights.sum(axis=0), np.clip(0.5 + inside * side / 6.0, 0.0, 1.0)


def _fibres(direction: np.ndarray, canvas: _Canvas) -> np.ndarray:
    """Strands along ``direction`` (radians), 0 to 1: noise averaged along the field (Cabral and Leedom 1993)."""
    n = canvas.cells(_FIBRE_UM)
    angle = canvas.enlarge(direction, n)
    along = np.stack([np.sin(angle), np.cos(angle)])
    noise = canvas.rng.normal(size=(n, n)).astype(np.float32)
    total = noise.copy()
    for sign in (-1.0, 1.0):
        at = np.mgrid[:n, :n].astype(np.float32)
        for _ in range(12):
            row, column = np.clip(np.rint(at).astype(np.int32), 0, n - 1)
            total += noise[row, column]
            at += sign * along[:, row, column]
    return np.clip(0.5 + 0.35 * canvas.enlarge(total / total.std()), 0.0, 1.0)


def _stamp(length_px: float, width_px: float, angle: float, pale: float) -> np.ndarray:
    """A soft-edged ellipse, 0 to 1, with a paler middle."""
    half = int(np.ceil(max(length_px, width_px))) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.hypot(u / length_px, v / width_px)
    ellipse = np.clip((1.0 - distance) * min(length_px, width_px) + 0.5, 0.0, 1.0)
    return np.asarray(ellipse * (1.0 - pale * np.exp(-4.0 * distance**2)))


def _scatter(
    canvas: _Canvas, share: np.ndarray, spacing_um: float, jitter: float, stamps: list[np.ndarray], which: np.ndarray
) -> np.ndarray:
    """Stamps on a jittered lattice wherever the cell type holds the ground; the darkest wins where they overlap."""
    side, spacing, rng = canvas.side_px, spacing_um / canvas.mpp, canvas.rng
    lattice = np.stack(np.meshgrid(*[np.arange(0.0, side + spacing, spacing)] * 2, indexing="ij"), axis=-1)
    lattice[1::2, :, 1] -= spacing / 2  # every other row shifted: closer packed, and no grid to be seen
    points = np.rint(lattice + rng.uniform(-jitter, jitter, lattice.shape) * spacing).astype(int).reshape(-1, 2)
    points = points[((points >= 0) & (points < side)).all(axis=1)]
    points = points[share[points[:, 0], points[:, 1]] > rng.uniform(0.3, 0.7, len(points))]
    chosen = which[points[:, 0], points[:, 1]]
    pad = max(stamp.shape[0] for stamp in stamps) // 2
    drawn = np.zeros((side + 2 * pad, side + 2 * pad), dtype=np.float32)
    for (row, column), kind, strength in zip(points + pad, chosen, rng.uniform(0.75, 1.0, len(points)), strict=True):
        half = stamps[kind].shape[0] // 2
        window = drawn[row - half : row + half + 1, column - half : column + half + 1]
        np.maximum(window, strength * stamps[kind], out=window)
    return drawn[pad : pad + side, pad : pad + side]


def _draw_tissue(
    shares: np.ndarray, tissue: np.ndarray, direction: np.ndarray, patient: _Patient, canvas: _Canvas
) -> np.ndarray:
    """The H&E image, uint8 ``(side, side, 3)``: Beer-Lambert absorption of the two stains."""
    mpp, rng = canvas.mpp, canvas.rng
    share = dict(zip(CELL_TYPES, shares * tissue, strict=True))
    ground = np.array([_GROUND[kind] for kind in CELL_TYPES], dtype=np.float32)
    haematoxylin, eosin = np.tensordot(ground.T, shares, axes=1)
    eosin += share["stroma"] * (_fibres(direction, canvas) - 0.1)
    cytoplasm = 1.0 + 0.12 * canvas.enlarge(canvas.smooth(8.0, 24.0))
    turned = np.rint(canvas.enlarge(direction) / np.pi * _TURNS).astype(int) % _TURNS
    random = rng.integers(_TURNS, size=tissue.shape)
    nuclei = np.zeros_like(tissue)
    for kind, look in _NUCLEI.items():
        halves_px = np.outer(rng.uniform(0.85, 1.15, _TURNS), [look.length_um, look.width_um]) / mpp
        stamps = [_stamp(length, width, np.pi * i / _TURNS, look.pale) for i, (length, width) in enumerate(halves_px)]
        drawn = _scatter(canvas, share[kind], look.spacing_um, 0.42, stamps, turned if kind == "stroma" else random)
        nuclei = np.maximum(nuclei, look.darkness * drawn)
    vacuoles = [_stamp(r / mpp, 0.88 * r / mpp, 2.0 * i, 0.0) for i, r in enumerate(np.linspace(15.0, 23.0, _TURNS))]
    holes = np.clip(1.3 * _scatter(canvas, share["fat"], 41.0, 0.25, vacuoles, random), 0.0, 1.0)
    haematoxylin = (haematoxylin * cytoplasm + nuclei) * (1.0 - holes)
    eosin = eosin * cytoplasm * (1.0 - 0.96 * holes)
    density = np.stack([haematoxylin * tissue, eosin * tissue], axis=-1) @ patient.stain.astype(np.float32)
    light = patient.background * (1.0 + 0.012 * canvas.enlarge(canvas.smooth(40.0, 900.0))[..., None])
    picture = light * np.exp(-density) + rng.normal(0.0, 1.5, (*tissue.shape, 1))
    return np.asarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


def _place_spots(shares: np.ndarray, tissue: np.ndarray, canvas: _Canvas) -> dict[str, np.ndarray]:
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
        f"Pitch {PITCH_UM:g} um, spots {SPOT_DIAMETER_UM:g} um wide, {PITCH_UM / given['pitch_px']:.4f} um per pixel. "
        "Genes NULL... follow no cell type, RARE... are seen in few spots.\n\n"
        + "".join(f"{name} = {value}\n" for name, value in given.items())
    )
