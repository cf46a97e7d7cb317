"""A stained section made by code: a picture of tissue on glass, and spots whose counts follow its nuclei."""

from functools import cache
from pathlib import Path

import numpy as np
import scipy.ndimage as ndi
from anndata import AnnData
from PIL import Image

from hifusion.section import build_section

WIDTH, HEIGHT, MPP = 640, 520, 4.0  # 2.56 x 2.08 mm
PITCH_UM, DIAMETER_UM = 100.0, 56.0
EOSIN = np.array([0.06, 0.22, 0.10])  # optical densities of red, green and blue
NUCLEUS = np.array([0.55, 0.50, 0.28])
GLASS = np.array([240.0, 238.0, 242.0])


@cache
def outline() -> np.ndarray:
    """Where the tissue is, bool ``(HEIGHT, WIDTH)``: a slanted egg, like nothing of its mirror images."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    along, across = 0.8 * (x - 290) + 0.6 * (y - 230), 0.8 * (y - 230) - 0.6 * (x - 290)
    return np.hypot(along / 200, across / (110 + 0.2 * along)) < 1


@cache
def nuclei() -> np.ndarray:
    """Share of each pixel that is nucleus, ``(HEIGHT, WIDTH)``, crowded in places."""
    rng = np.random.default_rng(0)
    crowded = ndi.gaussian_filter(rng.normal(size=(HEIGHT, WIDTH)), 14)
    crowded = np.clip(0.5 + 0.35 * crowded / crowded.std(), 0.03, 1)
    dots = rng.random((HEIGHT, WIDTH)) < 0.13 * crowded
    return np.clip(ndi.gaussian_filter(dots.astype(float), 0.8) * 3, 0, 1) * outline()


def picture(glass: np.ndarray = GLASS, haze: float = 0.0) -> np.ndarray:
    """The stained tissue on glass, uint8; ``haze`` is the density of eosin that bled into the glass beside it."""
    share = nuclei()[..., None]
    ground = np.random.default_rng(1).normal(1, 0.35, (HEIGHT, WIDTH))[..., None] * outline()[..., None]
    bled = ndi.gaussian_filter(outline().astype(float), 40)[..., None] * haze
    density = (ground * (1 - share) + bled) * EOSIN + share * NUCLEUS
    noise = np.random.default_rng(2).normal(0, 0.8, (HEIGHT, WIDTH, 3))
    return np.clip(glass * 10**-density + noise, 0, 255).astype(np.uint8)


def spots() -> tuple[np.ndarray, np.ndarray]:
    """Array positions (column, row) and centres (x, y) of a square array under the tissue, ``(N, 2)`` each."""
    step = PITCH_UM / MPP
    array = np.array([(column, row) for row in range(int(HEIGHT / step)) for column in range(int(WIDTH / step))])
    centres = step / 2 + array * step
    on = outline()[centres[:, 1].astype(int), centres[:, 0].astype(int)]
    return array[on], centres[on]


def measured(image: Path, **changed: object) -> AnnData:
    """A measured section on the picture at ``image``; facts can be ``changed``."""
    array, centres = spots()
    dense = ndi.uniform_filter(nuclei(), round(DIAMETER_UM / MPP))[centres[:, 1].astype(int), centres[:, 0].astype(int)]
    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.lognormal(0, 0.3, len(centres)) * (20 + 600 * dense))
    facts = {"mpp": MPP, "spot_diameter_um": DIAMETER_UM, "pitch_um": PITCH_UM, "centres_px": centres} | changed
    return build_section(
        counts[:, None],
        genes=["ALL"],
        spots=[f"{column}x{row}" for column, row in array],
        name="S1",
        patient="S",
        array_row=array[:, 1],
        array_col=array[:, 0],
        image=image,
        **facts,
    )


def write_picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path
