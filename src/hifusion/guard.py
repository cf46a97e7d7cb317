"""Does a measured section lie on its slide as it should: scale, axes, place.

Each way positions can be wrong (mirrored, rotated, axes swapped, scaled, shifted by pitches) is tried on the section:
where one of them makes it fit clearly better, it is wrong in the opposite way.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from anndata import AnnData
from scipy.stats import rankdata

from hifusion.errors import InputError
from hifusion.overlays import draw_check
from hifusion.placement import LEAST_SPOTS, Placement, spacing, spots_of, try_placements
from hifusion.slide import Slide

# Evidence at which another placement is believed, in standard errors. Ten public sections, whole, thinned and cropped,
# stayed below 1.1; turns and whole shifts put into them rose above 3.7 (docs/geometry.md).
ALARM = 3.0
MOST_OFF = 0.1  # relative; scanners and grids differ by 1 to 5 %
LEAST_ON_TISSUE, LEAST_CONTRAST = 0.7, 0.65


class Finding(NamedTuple):
    """One thing that is wrong with a section's geometry.

    ``kind`` is pitch, array, scale, outside, tissue, orientation or shift; ``message`` one line; ``value`` the figure
    it rests on.
    """

    kind: str
    message: str
    value: float


def check_section(section: AnnData, slide: Slide | None = None) -> list[Finding]:
    """What is wrong with where a section's spots lie; an empty list where nothing is.

    Parameters
    ----------
    section
        Measured; only spots that are ``in_tissue`` are looked at. Positions alone are tried by tissue alone.
    slide
        The section's own image where None; without any, only the array is checked.
    """
    facts = section.uns["hifusion"]
    if slide is None and facts["image"]:
        slide = Slide(Path(facts["image"]))
    findings = list(_check_array(section))
    if slide is not None:
        findings += _check_frame(section, slide)
        findings += _check_fit(section, slide)
    return findings


def require_geometry(
    section: AnnData, slide: Slide | None = None, *, force: bool = False, picture: Path | None = None
) -> list[Finding]:
    """Refuse a section whose geometry is wrong; gives what :func:`check_section` found.

    Parameters
    ----------
    force
        Go on in spite of findings.
    picture
        Where to draw the spots over the slide when something is found: a .png, .svg or .pdf.

    Raises
    ------
    InputError
        Something was found, all of it in one line.
    """
    findings = check_section(section, slide)
    if not findings:
        return []
    facts = section.uns["hifusion"]
    if picture is not None:
        slide = slide or (Slide(Path(facts["image"])) if facts["image"] else None)
        draw_check(section, slide, [finding.message for finding in findings], picture)
    if not force:
        listed = "; ".join(finding.message for finding in findings)
        look = f"look at {picture}, " if picture is not None else ""
        raise InputError(f"section {facts['section']}: {listed}; {look}mend the positions, or go on with --force")
    return findings


def _check_array(section: AnnData) -> Iterator[Finding]:
    """The lattice by itself: do pixels follow array positions, and are neighbours a pitch apart?"""
    facts, centres = section.uns["hifusion"], section.obsm["spatial"]
    if section.n_obs < LEAST_SPOTS:
        return
    array = np.column_stack([section.obs["array_col"], section.obs["array_row"], np.ones(section.n_obs)])
    array = array.astype(np.float64)
    known = np.isfinite(array).all() and np.linalg.matrix_rank(array) == 3
    if known:
        # The straight fit has the pitch of the array without the jitter of single spots.
        fitted = array @ np.linalg.lstsq(array, centres, rcond=None)[0]
        pitch_px = spacing(fitted)
        jitter = float(np.median(np.linalg.norm(centres - fitted, axis=1))) / max(pitch_px, 1e-6)
        if jitter > 0.5:
            yield Finding(
                "array",
                f"pixel positions miss their array positions by {jitter:.1f} pitches (median, at most 0.5)",
                jitter,
            )
            known = False
    pitch_um = (pitch_px if known else spacing(centres)) * facts["mpp"]
    if abs(pitch_um / facts["pitch_um"] - 1) > (MOST_OFF if known else 3 * MOST_OFF):
        yield Finding(
            "pitch",
            f"neighbouring spots are {pitch_um:.4g} um apart at {facts['mpp']:.4g} um/px, not {facts['pitch_um']:g} um",
            pitch_um / facts["pitch_um"],
        )


def _check_frame(section: AnnData, slide: Slide) -> Iterator[Finding]:
    """Image size and scale against the section's own."""
    mpp, centres, (width, height) = section.uns["hifusion"]["mpp"], section.obsm["spatial"], slide.size_px
    if slide.mpp and abs(slide.mpp / mpp - 1) > MOST_OFF:
        message = f"the slide has {slide.mpp:.4g} um/px but the section {mpp:.4g} um/px"
        yield Finding("scale", message, slide.mpp / mpp)
    outside = int(((centres < 0) | (centres >= (width, height))).any(axis=1).sum())
    if outside:
        message = f"{outside} of {section.n_obs} spots lie outside the {width} x {height} px image"
        yield Finding("outside", message, outside / section.n_obs)


def _check_fit(section: AnnData, slide: Slide) -> Iterator[Finding]:
    """Tissue and nuclei under the spots, where they are and where another placement would put them."""
    spots = spots_of(section)
    tried = try_placements(spots, slide, section.uns["hifusion"]["mpp"])
    if tried is None:
        return
    given, best, on = tried
    if best.evidence > ALARM:
        message = (
            f"the spots fit the slide better {best.what}: {_told(best)}, now {_told(given)} (or the image is another "
            "section's)"
        )
        yield Finding(best.kind, message, best.evidence)
    elif on.mean() < LEAST_ON_TISSUE and _contrast(spots.log_counts, on) < LEAST_CONTRAST:
        message = f"only {on.mean():.0%} of the spots lie on tissue, and those off it have no fewer counts"
        yield Finding("tissue", message, float(on.mean()))


def _told(placement: Placement) -> str:
    return f"{placement.tissue:.0%} tissue, agreement with nuclei {placement.agreement:.2f}"


def _contrast(log_counts: np.ndarray | None, on: np.ndarray) -> float:
    """Chance that a spot on tissue has more counts than one off it; 1/2 where that is not known."""
    if log_counts is None or not on.any():
        return 0.5
    ranks, many, few = rankdata(log_counts), on.sum(), (~on).sum()
    return float((ranks[on].sum() - many * (many + 1) / 2) / (many * few))
