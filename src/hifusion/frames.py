"""Where spots lie in their patient's tissue: one frame of positions a patient, and pictures that find it again.

A run keeps a small picture of each patient's first training section. Other sections of that patient, in training or
later, are laid over it by their pictures; what cannot be laid over it lies in a frame of its own, near to nothing.

::

    frames/frames.json   patient, section, um per pixel and spots of each frame
    frames/0.jpg         its section's slide at about 8 um a pixel
"""

import hashlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hifusion import files
from hifusion.cohort import SectionView
from hifusion.registration import positions_um, registered
from hifusion.slide import Slide

FOLDER, TABLE = "frames", "frames.json"
PICTURE_UM = 8.0  # what tissue is found on
APART_UM = 1e5  # frames lie side by side; no slide is 10 cm wide
NOWHERE_UM = -1e7  # of spots in no frame


@dataclass(frozen=True)
class Frames:
    """The frames of a run, by their first sections (which have a small picture instead of their slide)."""

    sections: tuple[SectionView, ...]

    @classmethod
    def build(cls, train: Sequence[SectionView], folder: Path) -> "Frames":
        """Frames of the training sections, in their order; pictures and table are written into a run folder."""
        frames = cls(())
        for view in train:
            if view.image is not None and frames.frame_of(view) is None:
                number = len(frames.sections)
                frames = cls((*frames.sections, _pictured(view, folder / FOLDER / f"{number}.jpg")))
        table = [
            {
                "patient": view.patient,
                "section": view.name,
                "mpp": view.mpp,
                "pitch_px": view.pitch_px,
                "spot_diameter_um": view.spot_diameter_um,
                "image_digest": view.image_digest,
                "centres_px": view.centres_px.tolist(),
            }
            for view in frames.sections
        ]
        files.write_json(folder / FOLDER / TABLE, {"frames": table})
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "Frames":
        """The frames of a run folder; none where it has none."""
        path = folder / FOLDER / TABLE
        if not path.exists():
            return cls(())
        table = files.read_json(path)["frames"]
        return cls(tuple(_view(row, folder / FOLDER / f"{number}.jpg") for number, row in enumerate(table)))

    def frame_of(self, view: SectionView) -> tuple[int, np.ndarray] | None:
        """Number of the frame that a section can be laid in, and its spots there in um; None where there is none."""
        for number, first in enumerate(self.sections):
            if first.patient != view.patient or not view.patient:
                continue
            if first.name == view.name and len(first.centres_px) == len(view.centres_px):
                return number, positions_um(view)
            if view.image is not None and importlib.util.find_spec("SimpleITK") is not None:
                found = registered(view, first)
                if not found.doubts:
                    return number, found.moved(positions_um(view))
        return None

    def place(self, view: SectionView) -> np.ndarray:
        """Positions of a section's spots with all frames side by side, float32 ``(N, 2)``, um."""
        found = self.frame_of(view)
        if found is None:
            return np.full((len(view.centres_px), 2), NOWHERE_UM, dtype=np.float32)
        return (found[1] + [APART_UM * found[0], 0.0]).astype(np.float32)


def _pictured(view: SectionView, path: Path) -> SectionView:
    assert view.image is not None
    with Slide(view.image, view.mpp) as slide:
        longest = max(slide.size_px)
        picture = slide.thumbnail(max(1, round(longest * view.mpp / PICTURE_UM)))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    files.write_bytes(path, buffer.getvalue())
    um = longest * view.mpp / max(picture.shape[:2])
    row = {
        "patient": view.patient,
        "section": view.name,
        "mpp": um,
        "pitch_px": view.pitch_px * view.mpp / um,
        "spot_diameter_um": view.spot_diameter_um,
        "image_digest": hashlib.sha256(buffer.getvalue()).hexdigest(),
        # As the table keeps them: a registration is known by them, and is not found anew when the run is opened.
        "centres_px": np.round(view.centres_px * view.mpp / um, 3),
    }
    return _view(row, path)


def _view(row: dict[str, Any], path: Path) -> SectionView:
    nothing = np.zeros((len(row["centres_px"]), 0), dtype=np.float32)
    return SectionView(
        name=row["section"],
        patient=row["patient"],
        genes=(),
        expression=nothing,
        total_counts=nothing.sum(axis=1),
        centres_px=np.array(row["centres_px"], dtype=np.float64),
        pitch_px=row["pitch_px"],
        mpp=row["mpp"],
        spot_diameter_um=row["spot_diameter_um"],
        image=path,
        image_digest=row["image_digest"],
    )
