"""H&E-like tissue drawn by code: where each cell type lies in a section, and the picture of it.

Four cell types fill a tissue: tumour (large pale nuclei, dense), immune (small round dark nuclei, packed), stroma (pink
fibres, few elongated nuclei) and fat (white round vacuoles). Patients differ in stain and outline.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

PITCH_UM = 200.0
CELL_TYPES = ("tumour", "immune", "stroma", "fat")
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
class Patient:
    """What a patient's sections share."""

    stain: np.ndarray  # (2, 3): optical density of one unit of haematoxylin and of eosin in R, G, B
    background: np.ndarray  # (3,), 0..255
    gene_factors: np.ndarray  # (G,)
    outline: np.ndarray  # (2, 4): cosine and sine waves of the tissue's radius


@dataclass(frozen=True)
class Canvas:
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


def draw_patient(genes: int, rng: Generator) -> Patient:
    stain = np.clip(_STAIN + rng.normal(0.0, 0.045, (2, 3)), 0.05, None)
    stain *= rng.uniform([[0.8], [0.6]], [[1.3], [1.05]]) / np.linalg.norm(stain, axis=1, keepdims=True)
    background = np.array([243.0, 238.0, 241.0]) + rng.uniform(-6.0, 6.0, 3)
    return Patient(stain, background, np.exp(rng.normal(0.0, 0.4, genes)), rng.normal(0.0, 0.045, (2, 4)))


def next_fields(before: np.ndarray | None, canvas: Canvas) -> np.ndarray:
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


def cell_shares(fields: np.ndarray, patient: Patient, canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
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


def _fibres(direction: np.ndarray, canvas: Canvas) -> np.ndarray:
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
    canvas: Canvas, share: np.ndarray, spacing_um: float, jitter: float, stamps: list[np.ndarray], which: np.ndarray
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


def draw_tissue(
    shares: np.ndarray, tissue: np.ndarray, direction: np.ndarray, patient: Patient, canvas: Canvas
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
