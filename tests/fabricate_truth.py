"""What the layouts made by code have in common: genes, spots, slides, and the truth a reader must give back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE_PX = (420, 300)  # (width, height) of every slide
SYMBOLS = ("ACTB", "TBCE", "TBCE", "GAPDH", "KRT8", "MYC")  # TBCE stands twice, as in 10x references
UNIQUE = ("ACTB", "TBCE", "TBCE-1", "GAPDH", "KRT8", "MYC")
IDS = tuple(f"ENSG{i:011d}" for i in range(len(SYMBOLS)))
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Truth:
    """What a reader must give of one section."""

    spots: list[str]
    centres: np.ndarray
    counts: np.ndarray
    mpp: float
    pitch_um: float
    patient: str
    genes: tuple[str, ...] = UNIQUE
    gene_ids: tuple[str, ...] | None = IDS
    has_image: bool = True


def same(values):
    """Leaves counts or spot names as they are."""
    return values


def counts_like(n_spots: int, seed: int, n_genes: int = len(SYMBOLS)) -> np.ndarray:
    return np.random.default_rng(seed).poisson(np.linspace(1, 9, n_genes), (n_spots, n_genes))


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Array columns and rows of 5 x 7 spots, the first corner missing."""
    row, column = (axis.ravel()[1:] for axis in np.mgrid[10:15, 4:11])
    return column, row


def grid_centres() -> np.ndarray:
    """40 px apart; x from 30 to 270, y from 40 to 200."""
    column, row = grid()
    return np.column_stack([30.0 + 40 * (column - 4), 40.0 + 40 * (row - 10)])


def barcode(number: int) -> str:
    return "".join("ACGT"[number >> 2 * place & 3] for place in range(16)) + "-1"


def write_slide(path: Path, size_px: tuple[int, int] = SIZE_PX) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size_px[1], : size_px[0]]
    Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8)).save(path)
    return path
