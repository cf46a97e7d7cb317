"""The published comparison as data: what each column of its Table 1 was made from, and the figures that stand in it.

Source: HiFusion, arXiv 2511.12969. Its PCC is ``pcc_per_spot`` here: across genes at each spot, averaged over spots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from hifusion.errors import InputError
from hifusion.readers import READERS, her2st, stnet

METHODS = {
    "stnet": "ST-Net",
    "histogene": "HisToGene",
    "hist2st": "Hist2ST",
    "egn": "EGN",
    "triplex": "TRIPLEX",
    "asign2d": "ASIGN-2D",
    "asign3d": "ASIGN-3D",
    "hifusion": "HiFusion",
}
"""Model -> what the paper calls it, in the order of its table."""


class Figures(NamedTuple):
    """Scores of one method in one column of the table."""

    mse: float
    mae: float
    pcc_per_spot: float


class Layout(NamedTuple):
    """What a name in a raw folder says, so that nothing needs to be read to say what is missing.

    Attributes
    ----------
    patient
        Name of a section -> its patient.
    has_image
        Folder, name of a section -> whether its slide is there.
    """

    reader: ModuleType
    patient: Callable[[str], str]
    has_image: Callable[[Path, str], bool]


def _her2st_image(root: Path, name: str) -> bool:
    return any((root / her2st.IMAGES / name[0] / name).glob("[!.]*"))


def _stnet_image(root: Path, name: str) -> bool:
    """Letters before a section's number differ between its files, as the reader says."""
    key = stnet.LETTERS.sub("", name)
    return any(stnet.LETTERS.sub("", path.stem.removeprefix("HE_")) == key for path in root.glob("HE_*"))


LAYOUTS: dict[str, Layout] = {
    "her2st": Layout(READERS["her2st"], lambda name: name[0], _her2st_image),
    "stdata": Layout(READERS["stnet"], lambda name: name.split("_")[0], _stnet_image),
}
"""By name of the data set in ``hifusion.downloading``."""


def _all_of_her2st(names: Sequence[str]) -> list[str]:
    return [f"{patient}{number}" for patient in "ABCDEFGH" for number in range(1, 7 if patient < "E" else 4)]


def _first_three(names: Sequence[str]) -> list[str]:
    """Sections 1-3 of each patient: which they are, only the folder itself says."""
    patient = LAYOUTS["stdata"].patient
    by_patient: dict[str, list[str]] = {}
    for name in sorted(names):
        by_patient.setdefault(patient(name), []).append(name)
    return [name for own in by_patient.values() for name in own[:3]]


@dataclass(frozen=True)
class Study:
    """One column of the table.

    Attributes
    ----------
    dataset
        Name in :data:`LAYOUTS`, and what `hifusion download` calls it.
    protocol, recipe
        Names in ``hifusion.protocols`` and ``hifusion.recipes``.
    needs
        What the protocol asks of the sections, in words.
    sections
        Names that the folder has -> names of the full table.
    panel
        Name of a panel of the package, or "paper": the paper's rule over the sections that are run.
    n_sections, n_folds, n_spots
        Of the full table; ``n_spots`` are those tested, None where they were never counted here.
    published
        Model -> its figures.
    """

    title: str
    dataset: str
    protocol: str
    recipe: str
    needs: str
    sections: Callable[[Sequence[str]], list[str]]
    panel: str
    n_sections: int
    n_folds: int
    n_spots: int | None
    published: dict[str, Figures]

    @property
    def layout(self) -> Layout:
        """How its raw folder is read."""
        return LAYOUTS[self.dataset]


_TWO_SECTIONS = "two sections of one patient"

STUDIES: dict[str, Study] = {
    "her2st-2d": Study(
        title="HER2+ 2D",
        dataset="her2st",
        protocol="patient_folds",
        recipe="her2st_2d",
        needs="patients of two of the folds A+E, B+F, C+G, D+H",
        sections=_all_of_her2st,
        panel="her2st_paper",
        n_sections=36,
        n_folds=4,
        n_spots=13620,
        published={
            "stnet": Figures(0.6523, 0.6255, 0.4621),
            "histogene": Figures(0.6105, 0.6063, 0.4294),
            "hist2st": Figures(0.5843, 0.5885, 0.4478),
            "egn": Figures(0.5845, 0.5940, 0.4723),
            "triplex": Figures(0.5715, 0.5918, 0.4750),
            "asign2d": Figures(0.5830, 0.5901, 0.4601),
            "hifusion": Figures(0.5459, 0.5699, 0.4961),
        },
    ),
    "her2st-3d": Study(
        title="HER2+ 3D",
        dataset="her2st",
        protocol="first_section",
        recipe="her2st_3d",
        needs=_TWO_SECTIONS,
        sections=_all_of_her2st,
        panel="her2st_paper",
        n_sections=36,
        n_folds=8,
        n_spots=10165,
        published={
            "stnet": Figures(0.5323, 0.5747, 0.7042),
            "histogene": Figures(0.4851, 0.4899, 0.7028),
            "hist2st": Figures(0.3174, 0.4438, 0.7276),
            "egn": Figures(0.2917, 0.4258, 0.7441),
            "triplex": Figures(0.2899, 0.4268, 0.7471),
            "asign2d": Figures(0.3116, 0.4415, 0.7316),
            "asign3d": Figures(0.4163, 0.4987, 0.7019),
            "hifusion": Figures(0.2846, 0.4205, 0.7492),
        },
    ),
    "stdata-2d": Study(
        title="ST-Data 2D",
        dataset="stdata",
        protocol="patient_folds",
        recipe="stdata_2d",
        needs="two patients",
        sections=_first_three,
        panel="paper",
        n_sections=68,
        n_folds=4,
        n_spots=None,
        published={
            "stnet": Figures(0.5798, 0.5943, 0.5304),
            "histogene": Figures(0.5310, 0.5694, 0.5427),
            "hist2st": Figures(0.5230, 0.5636, 0.5442),
            "egn": Figures(0.5568, 0.5800, 0.5103),
            "triplex": Figures(0.5389, 0.5769, 0.5387),
            "asign2d": Figures(0.5449, 0.5764, 0.5373),
            "hifusion": Figures(0.5095, 0.5557, 0.5613),
        },
    ),
    "stdata-3d": Study(
        title="ST-Data 3D",
        dataset="stdata",
        protocol="first_section",
        recipe="stdata_3d",
        needs=_TWO_SECTIONS,
        sections=_first_three,
        panel="paper",
        n_sections=68,
        n_folds=23,
        n_spots=None,
        published={
            "stnet": Figures(0.4939, 0.5514, 0.7443),
            "histogene": Figures(0.4841, 0.5121, 0.7280),
            "hist2st": Figures(0.2877, 0.4240, 0.7725),
            "egn": Figures(0.2755, 0.4136, 0.7800),
            "triplex": Figures(0.2857, 0.4255, 0.7780),
            "asign2d": Figures(0.2822, 0.4204, 0.7741),
            "asign3d": Figures(0.3141, 0.4445, 0.7524),
            "hifusion": Figures(0.2711, 0.4102, 0.7838),
        },
    ),
}


def study(name: str) -> Study:
    """Look a column of the table up by name."""
    if name not in STUDIES:
        raise InputError(f"study {name!r} is unknown; use one of {', '.join(STUDIES)}")
    return STUDIES[name]
