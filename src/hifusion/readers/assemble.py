"""The steps all readers share: which sections are wanted, which slide and patient hold, and the finished section."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from anndata.utils import make_index_unique
from PIL import Image

from hifusion.errors import InputError
from hifusion.readers.options import ReadOptions
from hifusion.section import HIRES_PX, build_section
from hifusion.slide import BACKGROUND, Slide

# A picture's size over its scale factor gives the slide's size to within a pixel of the picture: 0.2 % of 600 px.
SIZE_TOLERANCE = 0.01


class Picture(NamedTuple):
    """A small picture of a slide, and how large the slide is."""

    pixels: np.ndarray
    """uint8 ``(h, w, 3)``, longest side at most ``HIRES_PX``."""
    full_size_px: tuple[int, int]
    """(width, height) of the slide."""


def chosen(known: Sequence[str], sections: Sequence[str] | None, root: Path) -> list[str]:
    """The wanted sections, all that are known where None; an unknown one is named in one line."""
    if not known:
        raise InputError(f"{root}: holds no section of this layout; give the folder that holds its files")
    unknown = [name for name in sections or () if name not in known]
    if unknown:
        raise InputError(f"{root}: has no section {', '.join(unknown)}; it has {', '.join(known)}")
    return list(known if sections is None else sections)


def unique_symbols(symbols: Sequence[str]) -> list[str]:
    """Gene symbols made unique as anndata does: a second ``TBCE`` is ``TBCE-1``."""
    return list(make_index_unique(pd.Index(list(symbols), dtype=str).astype(object)))


def as_picture(pixels: np.ndarray, scale: float) -> Picture:
    """A picture from an image kept in a file: grey, RGB or RGBA, bytes or fractions of one.

    Parameters
    ----------
    pixels
        ``(h, w)`` or ``(h, w, channels)``.
    scale
        Pixels of the picture per pixel of the slide.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype.kind == "f":
        pixels = np.clip(np.nan_to_num(pixels) * (255 if pixels.max(initial=0) <= 1 else 1), 0, 255)
    elif pixels.dtype.itemsize > 1:
        pixels = pixels // 257 if pixels.max(initial=0) > 255 else pixels
    pixels = pixels.astype(np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 4:
        opaque = pixels[..., 3:] / 255
        pixels = (pixels[..., :3] * opaque + BACKGROUND * (1 - opaque)).round().astype(np.uint8)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    height, width = pixels.shape[:2]
    full = round(width / scale), round(height / scale)
    shrink = max(width, height) / HIRES_PX
    if shrink > 1:
        size = max(1, round(width / shrink)), max(1, round(height / shrink))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    return Picture(pixels, full)


def assemble(
    counts: sp.csr_matrix | None,
    *,
    name: str,
    options: ReadOptions,
    source: Path,
    spots: Sequence[str],
    centres_px: np.ndarray,
    array_row: np.ndarray,
    array_col: np.ndarray,
    mpp: float,
    spot_diameter_um: float,
    pitch_um: float,
    genes: Sequence[str] = (),
    gene_ids: Sequence[str] | None = None,
    patient: str | None = None,
    in_tissue: np.ndarray | None = None,
    labels: Sequence[str | None] | None = None,
    image: Path | None = None,
    picture: Picture | None = None,
) -> AnnData:
    """Build one section; what ``options`` says of its slide and patient stands before what the layout says.

    Parameters
    ----------
    image
        The slide that the layout holds.
    picture
        A small picture of it that the layout holds; cut from the slide where None.

    Raises
    ------
    InputError
        No count at all, a slide that cannot be opened or is not the one ``picture`` shows, or what
        :func:`hifusion.section.build_section` refuses.
    """
    if counts is not None and not counts.count_nonzero():
        raise InputError(f"{source}: all counts of {len(spots)} spots are zero; give the matrix that was measured")
    told = options.images.get(name)
    if told is not None or (picture is None and image is not None):
        slide = Slide(told or image)  # type: ignore[arg-type]
        if picture is not None:
            _refuse_another_slide(slide, picture, source)
        image, picture = slide.path, Picture(slide.thumbnail(HIRES_PX), slide.size_px)
    return build_section(
        counts,
        spots=spots,
        centres_px=centres_px,
        name=name,
        patient=options.patients.get(name, patient or name),
        mpp=mpp,
        spot_diameter_um=spot_diameter_um,
        pitch_um=pitch_um,
        array_row=array_row,
        array_col=array_col,
        genes=genes,
        gene_ids=gene_ids,
        in_tissue=in_tissue,
        labels=labels,
        image=image,
        thumbnail=picture.pixels if picture else None,
        full_size_px=picture.full_size_px if picture else None,
        source=str(source),
    )


def _refuse_another_slide(slide: Slide, picture: Picture, source: Path) -> None:
    """Positions are in pixels of one image: another scan or a downscaled copy would move every spot."""
    width, height = picture.full_size_px
    if any(abs(a - b) > SIZE_TOLERANCE * b for a, b in zip(slide.size_px, picture.full_size_px, strict=True)):
        raise InputError(
            f"{slide.path}: is {slide.size_px[0]} x {slide.size_px[1]} px, but the positions of {source} are in pixels "
            f"of an image of about {width} x {height} px; give that image at full resolution"
        )
