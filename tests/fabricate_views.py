"""Sections to look at, made by code: measured and predicted, with a slide, intervals, trust, and hostile names."""

from pathlib import Path

import numpy as np
from anndata import AnnData
from PIL import Image

from fabricate import MPP, PITCH_PX
from hifusion.section import build_section, predicted_section, write_section

ACROSS, DOWN = 12, 9
GENES = ("ERBB2", "KRT19", "CD74", "TMSB10", *(f"GENE{n:02d}" for n in range(56)))
LEFT = "CD74"  # high in the left half, so that a lasso around it must find it
HOSTILE_GENE, HOSTILE_SECTION = "<img src=x onerror=alert(1)>", "../../x"
SIZE_PX = (ACROSS * PITCH_PX, DOWN * PITCH_PX)
TRUST = ("green", "amber", "red")


def centres() -> np.ndarray:
    """Spot centres (x, y), a pitch apart, half a pitch from the edges of the slide."""
    row, column = np.indices((DOWN, ACROSS)).reshape(2, -1)
    return (np.stack([column, row], axis=1) + 0.5) * PITCH_PX


def is_left() -> np.ndarray:
    """Which spots lie in the left half."""
    return centres()[:, 0] < SIZE_PX[0] / 2


def counts() -> np.ndarray:
    """Counts ``(N, G)``; those of the gene LEFT are five times as high in the left half."""
    rates = np.tile(np.linspace(40, 4, len(GENES)), (ACROSS * DOWN, 1))
    rates[is_left(), GENES.index(LEFT)] *= 5
    return np.random.default_rng(0).poisson(rates)


def write_slide(path: Path, discs: bool = True) -> Path:
    """A picture of pale waves, with a black disc where each spot was measured unless told otherwise."""
    y, x = np.mgrid[: SIZE_PX[1], : SIZE_PX[0]]
    waves = np.stack([np.sin(x / 40) + np.cos(y / 31), np.sin(x / 23), np.cos(y / 17)], axis=-1)
    from_centre = np.hypot(x % PITCH_PX - PITCH_PX / 2, y % PITCH_PX - PITCH_PX / 2)
    pixels = np.where(discs & (from_centre[..., None] < 50 / MPP), 0, 190 + 30 * waves)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def measured(slide: Path | None, name: str = "A1", genes: tuple[str, ...] = GENES) -> AnnData:
    """A measured section with two labels: left and right."""
    row, column = np.indices((DOWN, ACROSS)).reshape(2, -1)
    return build_section(
        counts(),
        genes=genes,
        spots=[f"{x}x{y}" for x, y in zip(column, row, strict=True)],
        centres_px=centres(),
        name=name,
        patient="A",
        mpp=MPP,
        spot_diameter_um=100.0,
        pitch_um=200.0,
        array_row=row,
        array_col=column,
        labels=["left" if left else "right" for left in is_left()],
        image=slide,
        thumbnail=np.full((SIZE_PX[1] // 4, SIZE_PX[0] // 4, 3), 200, dtype=np.uint8),
        full_size_px=SIZE_PX,
    )


def predicted(section: AnnData, run: str = "run-1", *, genes: int = 40, knows_errors: bool = False) -> AnnData:
    """Half the measured deviations plus noise, in ``log_share``; with intervals and trust where it knows its errors."""
    names = list(section.var_names[:genes])
    shifted = section[:, names].layers["counts"].toarray() + 1.0
    truth = np.log(shifted / shifted.sum(axis=1, keepdims=True))
    noise = np.random.default_rng(len(run)).normal(0, 0.2, truth.shape)
    values = (truth.mean(axis=0) + 0.5 * (truth - truth.mean(axis=0)) + noise).astype(np.float32)
    made = predicted_section(section, values, genes=names, normalisation="log_share", panel_digest="d", run=run)
    made.obs["novelty"] = np.linspace(0.2, 1.4, len(values))
    if knows_errors:
        made.layers["lower_90"], made.layers["upper_90"] = values - 0.3, values + 0.5
        made.var["expected_pcc_per_gene"] = np.linspace(0.6, -0.1, genes)
        made.var["expected_of_ceiling"] = np.linspace(0.9, 0.0, genes)
        made.var["trust"] = [TRUST[n % 3] for n in range(genes)]
    return made


def write_pair(folder: Path, *, knows_errors: bool = False) -> list[Path]:
    """A measured section and a prediction of it, as files beside their slide."""
    folder.mkdir(parents=True, exist_ok=True)
    section = measured(write_slide(folder / "slide.png"))
    paths = [folder / "measured.h5ad", folder / "predicted.h5ad"]
    write_section(section, paths[0])
    write_section(predicted(section, knows_errors=knows_errors), paths[1])
    return paths


def write_hostile(path: Path) -> Path:
    """A section whose own name is a path and whose first gene is markup; its slide is gone."""
    section = measured(None, genes=(HOSTILE_GENE, *GENES[1:]))
    made = predicted(section, run="<b>run</b>", knows_errors=True)
    made.uns["hifusion"] |= {"section": HOSTILE_SECTION, "image": "/nowhere/slide.svs"}
    write_section(made, path)
    return path


def write_positions(path: Path) -> Path:
    """A section of positions alone, without genes, slide or picture."""
    section = measured(None, name="bare")[:, :0].copy()
    del section.layers["counts"]
    section.uns["hifusion"]["normalisation"] = ""
    section.uns["spatial"]["bare"]["images"] = {}
    write_section(section, path)
    return path
