"""One section laid over another of the same patient by one affine map, and how far off that may be.

Light on purpose: tissue and its optical density at 32 um a pixel, turned in steps to find the side that is up, then
moved, turned and, where that is worth it, sheared until the two densities tell most of each other (Mattes mutual
information, by SimpleITK). Nothing is bent: how consecutive sections differ beyond an affine map stays as it is.

Only pictures and positions are looked at, never expression.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage as ndi
from scipy.spatial import KDTree

from hifusion.cohort import SectionView
from hifusion.errors import InputError
from hifusion.slide import Slide
from hifusion.tissue import optical_density, small_picture, tissue_of

FINE_UM, COARSE_UM = 32.0, 64.0  # um per pixel where maps are refined, and where they are judged
STEP_DEGREES = 15
SCALES = (0.8, 1.25)  # consecutive sections of one block shrink and stretch by a few per cent
LEAST_DICE, LEAST_SIMILARITY = 0.7, 0.2

_STARTS = 3  # turns that are refined before one is chosen
_WORTH = 0.01  # of Dice + similarity: an affine map that fits better by less follows noise, a rigid one is steadier
_RING_UM = 400.0  # glass around the tissue that counts too, so that the outlines are brought together
_SPOT_REACH = 0.75  # of the pitch: discs of this radius around the spots of a lattice leave no hole
_MARGIN_UM = 512.0  # around the spots where there is no slide
_BINS, _ITERATIONS = 32, 200
_STEP_UM, _LAST_STEP_UM = 32.0, 0.5

# By what a registration looks at, since each fold makes new views of the same sections.
_known: dict[str, "Registration"] = {}


class Change(NamedTuple):
    """A figure for the sections as they lie on their slides, and after registration."""

    before: float
    after: float


class Spread(NamedTuple):
    """Median and 95 % of a distance over the moving section's spots, in um."""

    median: float
    most: float


@dataclass(frozen=True, eq=False)
class Registration:
    """An affine map between two sections, with its error.

    Attributes
    ----------
    moving, fixed
        Names of the sections.
    matrix
        float64 ``(2, 3)``: takes (x, y, 1) of the moving section in um (``centres_px * mpp``) to the fixed one's um.
    dice
        Overlap of the two tissues, 1 where they are the same.
    similarity
        Correlation of optical density at 64 um where both are tissue; NaN without pictures or without overlap.
    nearest_spot_um, off_tissue_um
        From each moved spot to the nearest fixed spot, and to the fixed tissue (0 on it).
    there_and_back_um
        How far from its place a spot comes back when it is moved by ``matrix``, then by the map found, independently,
        from fixed to moving. A floor of the error: what misleads both ways in the same manner does not show, nor does
        what an affine map cannot follow.
    doubts
        Why not to trust the map; empty where nothing speaks against it.
    method
        How it was found, in a few words.
    """

    moving: str
    fixed: str
    matrix: np.ndarray
    dice: Change
    similarity: Change
    nearest_spot_um: Spread
    off_tissue_um: Spread
    there_and_back_um: Spread
    doubts: tuple[str, ...]
    method: str

    def moved(self, positions_um: np.ndarray) -> np.ndarray:
        """Positions ``(N, 2)`` of the moving section in the fixed one's frame, both in um."""
        return np.asarray(positions_um) @ self.matrix[:, :2].T + self.matrix[:, 2]


@dataclass(frozen=True, eq=False)
class _Picture:
    """What a section looks like from afar: tissue and a grey value per pixel of ``um`` (x, y) from ``first_um`` on."""

    mask: np.ndarray
    grey: np.ndarray
    um: np.ndarray
    first_um: np.ndarray  # centre of the first pixel

    @property
    def area_um2(self) -> float:
        return float(self.mask.sum() * self.um.prod())

    @property
    def tissue_um(self) -> np.ndarray:
        """Centres (x, y) of the pixels of tissue, ``(n, 2)``."""
        return self.first_um + np.argwhere(self.mask)[:, ::-1] * self.um


class _Map(NamedTuple):
    """A map from moving to fixed um, 3 x 3, and how well it fits: Dice plus similarity."""

    matrix: np.ndarray
    score: float


def positions_um(view: SectionView) -> np.ndarray:
    """Spot centres (x, y) of a section in um of its own slide, float64 ``(N, 2)``."""
    return np.asarray(view.centres_px, dtype=np.float64) * view.mpp


def register(moving: SectionView, fixed: SectionView, *, mirror: bool = False) -> Registration:
    """Find the affine map from one section to another of the same block; the same sections give the same map.

    Parameters
    ----------
    mirror
        Also try the moving section face down; then a mirror image is taken where it fits better.

    Raises
    ------
    InputError
        SimpleITK is not installed, or a slide cannot be read.
    """
    sitk = _simpleitk()
    pictures, seen = _pictures(moving, fixed)
    there, back, kind = _kind(_align(sitk, *pictures, mirror), _align(sitk, *pictures[::-1], mirror))
    start, spots = positions_um(moving), positions_um(fixed)
    end = _moved(there.matrix, start)
    away = _away(end, pictures[1].tissue_um)
    coarse = _shrunk(pictures[0]), _shrunk(pictures[1])
    before, after = (_fit(*coarse, matrix) for matrix in (np.eye(3), there.matrix))
    found = Registration(
        moving=moving.name,
        fixed=fixed.name,
        matrix=there.matrix[:2],
        dice=Change(before[0], after[0]),
        similarity=Change(before[1], after[1]) if seen else Change(np.nan, np.nan),
        nearest_spot_um=_spread(_away(end, spots)),
        off_tissue_um=_spread(np.where(away <= pictures[1].um.max(), 0.0, away)),
        there_and_back_um=_spread(np.linalg.norm(_moved(back.matrix, end) - start, axis=1)),
        doubts=(),
        method=f"{kind}, by {'optical density' if seen else 'the outline of tissue or spots alone'}",
    )
    return replace(found, doubts=tuple(_doubts(found, fixed.pitch_px * fixed.mpp)))


def registered(moving: SectionView, fixed: SectionView) -> Registration:
    """As :func:`register`, found once in a process for the same pictures and positions."""
    sha = hashlib.sha256()
    for view in (moving, fixed):
        picture = view.image_digest or str(view.image)
        sha.update(repr((view.name, picture, view.mpp, view.pitch_px)).encode())
        sha.update(positions_um(view).tobytes())
    key = sha.hexdigest()
    if key not in _known:
        _known[key] = register(moving, fixed)
    return _known[key]


def common_frame(views: Sequence[SectionView], *, mirror: bool = False) -> list[np.ndarray]:
    """Spot positions ``(N, 2)`` of several sections in um of the first one's slide; each is registered to the first."""
    if not views:
        raise InputError("a common frame needs at least one section; none was given")
    first = views[0]
    moved = [register(view, first, mirror=mirror).moved(positions_um(view)) for view in views[1:]]
    return [positions_um(first), *moved]


def _simpleitk() -> ModuleType:
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(
            "registration needs SimpleITK, which is not installed; run `pip install 'hifusion[registration]'`"
        ) from error
    return SimpleITK


def _doubts(found: Registration, pitch_um: float) -> list[str]:
    said = []
    if found.dice.after < LEAST_DICE:
        said.append(f"the tissues overlap by a Dice of {found.dice.after:.2f} only, below {LEAST_DICE:g}")
    if found.similarity.after < LEAST_SIMILARITY:  # never true of NaN
        said.append(f"the densities correlate by {found.similarity.after:.2f} only, below {LEAST_SIMILARITY:g}")
    if found.there_and_back_um.most > pitch_um:
        said.append(f"there and back moves spots by {found.there_and_back_um.most:.0f} um, more than their pitch")
    return said


def _pictures(moving: SectionView, fixed: SectionView) -> tuple[tuple[_Picture, _Picture], bool]:
    """Both sections from afar, and whether their greys are densities: outlines alone where one has no picture."""
    ours, theirs = (_of_slide(view) if view.image else None for view in (moving, fixed))
    if ours and theirs:
        return (ours, theirs), True
    return (_outlined(ours or _of_spots(moving)), _outlined(theirs or _of_spots(fixed))), False


def _of_slide(view: SectionView) -> _Picture | None:
    """Tissue and optical density; None where no tissue is found."""
    assert view.image is not None
    with Slide(view.image, view.mpp) as slide:
        picture, um = small_picture(slide, view.mpp)
        size_um = np.array(slide.size_px) * view.mpp
    mask = tissue_of(picture, um)
    each = size_um / mask.shape[::-1]
    found = _Picture(mask, optical_density(picture).mean(axis=2), each, each / 2)
    fine = _shrunk(found, FINE_UM)
    return fine if fine.mask.any() else None


def _of_spots(view: SectionView) -> _Picture:
    """Tissue is what is near a spot; near enough that it can be seen at :data:`COARSE_UM`."""
    spots, pitch_um = positions_um(view), view.pitch_px * view.mpp
    first, last = spots.min(axis=0) - _MARGIN_UM, spots.max(axis=0) + _MARGIN_UM
    x, y = (np.arange(a, b + FINE_UM, FINE_UM) for a, b in zip(first, last, strict=True))
    mask = _away(np.stack(np.meshgrid(x, y), axis=-1), spots) <= max(_SPOT_REACH * pitch_um, COARSE_UM)
    return _Picture(mask, np.zeros(mask.shape, dtype=np.float32), np.full(2, FINE_UM), first)


def _outlined(picture: _Picture) -> _Picture:
    """The same tissue, its grey the distance to its edge: what an outline alone can be matched by."""
    depth = np.asarray(ndi.distance_transform_edt(np.pad(picture.mask, 1), sampling=picture.um[::-1]))[1:-1, 1:-1]
    return _Picture(picture.mask, (depth / depth.max()).astype(np.float32), picture.um, picture.first_um)


def _shrunk(picture: _Picture, um: float = COARSE_UM) -> _Picture:
    """At about ``um`` a pixel: means over blocks, the grey's over the tissue in them."""
    block = max(1, round(um / float(picture.um.mean())))
    margins = [(0, -side % block) for side in picture.mask.shape]
    mask = np.pad(picture.mask, margins).astype(np.float32)
    grey = np.pad(picture.grey, margins) * mask
    rows, columns = mask.shape[0] // block, mask.shape[1] // block
    share, total = (part.reshape(rows, block, columns, block).mean(axis=(1, 3)) for part in (mask, grey))
    first = picture.first_um + picture.um * (block - 1) / 2
    return _Picture(share >= 0.5, total / np.maximum(share, 1e-6), picture.um * block, first)


def _align(sitk: Any, moving: _Picture, fixed: _Picture, mirror: bool) -> tuple[_Map, _Map]:
    """The best rigid and the best affine map, of the moving section face up and, where asked for, face down."""
    found = _align_as_it_lies(sitk, moving, fixed)
    if not mirror:
        return found
    flip = np.diag([-1.0, 1.0, 1.0])
    first = np.array([-moving.first_um[0] - (moving.mask.shape[1] - 1) * moving.um[0], moving.first_um[1]])
    down = _align_as_it_lies(sitk, _Picture(moving.mask[:, ::-1], moving.grey[:, ::-1], moving.um, first), fixed)
    rigid, affine = (_Map(one.matrix @ flip, one.score) for one in down)
    return max(found, (rigid, affine), key=lambda pair: pair[0].score)


def _align_as_it_lies(sitk: Any, moving: _Picture, fixed: _Picture) -> tuple[_Map, _Map]:
    """Turned in steps around the centres of mass; the best turns made rigid maps; the best of these also affine."""
    coarse = _shrunk(moving), _shrunk(fixed)
    turns = sorted((_turn(*coarse, degrees) for degrees in range(0, 360, STEP_DEGREES)), key=lambda one: -one.score)
    rigid = max((_refine(sitk, moving, fixed, turn, False) for turn in turns[:_STARTS]), key=lambda one: one.score)
    return rigid, _refine(sitk, moving, fixed, rigid, True)


def _kind(there: tuple[_Map, _Map], back: tuple[_Map, _Map]) -> tuple[_Map, _Map, str]:
    """The rigid or the affine maps, of one kind in both directions, and the kind in words."""
    stretches = np.array([np.linalg.svd(way[1].matrix[:2, :2], compute_uv=False) for way in (there, back)])
    if stretches.max() > SCALES[1] or stretches.min() < SCALES[0]:
        refused = f"rigid map, since the affine one scales by {stretches.min():.2f} to {stretches.max():.2f}"
        return there[0], back[0], refused
    if sum(affine.score - rigid.score for rigid, affine in (there, back)) / 2 < _WORTH:
        return there[0], back[0], "rigid map"
    return there[1], back[1], "affine map"


def _turn(moving: _Picture, fixed: _Picture, degrees: int) -> _Map:
    """Turned around the centre of mass of the moving tissue, which is laid on that of the fixed one."""
    angle = np.deg2rad(degrees)
    matrix = np.eye(3)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:2, 2] = fixed.tissue_um.mean(axis=0) - matrix[:2, :2] @ moving.tissue_um.mean(axis=0)
    return _Map(matrix, _score(moving, fixed, matrix))


def _refine(sitk: Any, moving: _Picture, fixed: _Picture, start: _Map, affine: bool) -> _Map:
    """From a map to the nearby one, rigid or affine, of the highest mutual information."""
    # Lengths in radii of the fixed tissue, from its centre: there a step turns, shears and shifts it about equally far.
    centre = fixed.tissue_um.mean(axis=0)
    radius = max(float(np.sqrt(np.square(fixed.tissue_um - centre).sum(axis=1).mean())), FINE_UM)
    frame = np.array([[1, 0, -centre[0]], [0, 1, -centre[1]], [0, 0, radius]]) / radius
    known = frame @ np.linalg.inv(start.matrix) @ np.linalg.inv(frame)  # SimpleITK's maps go from fixed to moving
    if affine:
        sought = sitk.AffineTransform(known[:2, :2].ravel().tolist(), known[:2, 2].tolist())
    else:
        sought = sitk.Euler2DTransform((0.0, 0.0), float(np.arctan2(known[1, 0], known[0, 0])), known[:2, 2].tolist())
    method = sitk.ImageRegistrationMethod()
    # In one piece and on every pixel: sums come out in the same order, so the map is the same in every run.
    method.SetNumberOfWorkUnits(1)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetMetricAsMattesMutualInformation(_BINS)
    near = ndi.distance_transform_edt(~fixed.mask, sampling=fixed.um[::-1]) <= _RING_UM
    method.SetMetricFixedMask(_image(sitk, near.astype(np.uint8), fixed, frame))
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(_STEP_UM / radius, _LAST_STEP_UM / radius, _ITERATIONS)
    method.SetShrinkFactorsPerLevel([1] if affine else [2, 1])
    method.SetSmoothingSigmasPerLevel([FINE_UM / radius] if affine else [2 * FINE_UM / radius, FINE_UM / radius])
    method.SetInitialTransform(sought, inPlace=True)
    try:
        method.Execute(*(_image(sitk, part.grey * part.mask, part, frame) for part in (fixed, moving)))
    except RuntimeError:  # ITK's word for pictures that hold too little, or that no longer overlap
        return start
    known[:2] = np.column_stack([np.reshape(sought.GetMatrix(), (2, 2)), sought.GetTranslation()])
    matrix = np.linalg.inv(np.linalg.inv(frame) @ known @ frame)
    return _Map(matrix, _score(_shrunk(moving), _shrunk(fixed), matrix))


def _image(sitk: Any, values: np.ndarray, picture: _Picture, frame: np.ndarray) -> Any:
    image = sitk.GetImageFromArray(np.ascontiguousarray(values))
    image.SetSpacing((picture.um * frame[0, 0]).tolist())
    image.SetOrigin(_moved(frame, picture.first_um).tolist())
    return image


def _score(moving: _Picture, fixed: _Picture, matrix: np.ndarray) -> float:
    dice, similarity = _fit(moving, fixed, matrix)
    return dice + (similarity if np.isfinite(similarity) else -1.0)


def _fit(moving: _Picture, fixed: _Picture, matrix: np.ndarray) -> tuple[float, float]:
    """Dice of the tissues and correlation of the greys on both, the moving section seen through a map."""
    back = np.linalg.inv(matrix)
    at = (_moved(back, fixed.tissue_um) - moving.first_um) / moving.um
    mask, grey = (
        ndi.map_coordinates(part.astype(np.float32), at.T[::-1], order=1, mode="constant")
        for part in (moving.mask, moving.grey * moving.mask)
    )
    both = mask >= 0.5
    area = fixed.area_um2 + moving.area_um2 * abs(np.linalg.det(matrix[:2, :2]))
    dice = float(2 * both.sum() * fixed.um.prod() / area)
    ours, theirs = fixed.grey[fixed.mask][both], grey[both] / mask[both]
    varied = len(ours) > 2 and ours.std() > 0 and theirs.std() > 0
    return dice, float(np.corrcoef(ours, theirs)[0, 1]) if varied else np.nan


def _away(positions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """From each position to the nearest of the others."""
    return np.asarray(KDTree(others).query(positions)[0])


def _moved(matrix: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(positions @ matrix[:2, :2].T + matrix[:2, 2])


def _spread(distances: np.ndarray) -> Spread:
    return Spread(float(np.median(distances)), float(np.percentile(distances, 95)))
