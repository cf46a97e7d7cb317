"""What a user can tell a reader that the files do not say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ReadOptions:
    """What the files of a layout may leave open.

    Attributes
    ----------
    images
        Section name -> its full-resolution slide, where the layout holds none or another should be used.
    patients
        Section name -> patient; a section that is not named keeps the layout's own, or is a patient of its own.
    mpp
        um per full-resolution pixel, instead of what the layout or the slide says.
    bin_um
        Side of the squares that small bins are summed into, um (Visium HD).
    """

    images: Mapping[str, Path] = field(default_factory=dict)
    patients: Mapping[str, str] = field(default_factory=dict)
    mpp: float | None = None
    bin_um: float | None = None


NOTHING_TOLD = ReadOptions()
