"""Which sections are trained on and which are tested: protocols as data, and the check that nothing leaks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from hifusion.errors import InputError

# HER2's folds in the HiFusion paper (arXiv 2511.12969), 2D protocol. Any data set of patients A-H is grouped so.
HER2_FOLDS = (("A", "E"), ("B", "F"), ("C", "G"), ("D", "H"))
BLOCKS = 4
# With fewer patients left to train on, giving one up to validation costs more than it tells.
LEAST_TRAINING_PATIENTS = 3


@dataclass(frozen=True)
class SectionInfo:
    """Name of a section and the patient it is of."""

    name: str
    patient: str


@dataclass(frozen=True)
class Fold:
    """One split: names of sections, each in one of the three at most.

    Attributes
    ----------
    train
        Sections to fit on.
    validation
        Sections to select the epoch on. Empty: the trainer holds out blocks of spots of the training sections.
    test
        Sections to score, touched once.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def outside_test(self) -> tuple[str, ...]:
        """Training and validation sections: what a method without early stopping is fitted on."""
        return self.train + self.validation


class Protocol(NamedTuple):
    """A way to make folds.

    Attributes
    ----------
    folds
        Sections -> folds.
    same_patient
        Whether a tested section's patient is trained on: such scores are reported apart and called so.
    meaning
        One line for tables.
    """

    folds: Callable[[Sequence[SectionInfo]], list[Fold]]
    same_patient: bool
    meaning: str


def patient_folds(sections: Sequence[SectionInfo]) -> list[Fold]:
    """Folds of whole patients: the published pairs where the patients are among A-H, else sorted patients in 4 blocks.

    One patient, the first of the next fold, is set aside for validation where at least three others remain to train on.

    Raises
    ------
    InputError
        Fewer than two folds come of it.
    """
    by_patient = _by_patient(sections)
    published = [tuple(patient for patient in pair if patient in by_patient) for pair in HER2_FOLDS]
    if sum(map(len, published)) == len(by_patient):
        groups = [group for group in published if group]
    else:
        blocks = np.array_split(np.arange(len(by_patient)), min(BLOCKS, len(by_patient)))
        groups = [tuple(list(by_patient)[i] for i in block) for block in blocks]
    return _between_patients(by_patient, groups, "patient_folds")


def leave_one_patient_out(sections: Sequence[SectionInfo]) -> list[Fold]:
    """One fold per patient, tested on all its sections; validation as in :func:`patient_folds`.

    Raises
    ------
    InputError
        There is only one patient.
    """
    by_patient = _by_patient(sections)
    return _between_patients(by_patient, [(patient,) for patient in by_patient], "leave_one_patient_out")


def first_section(sections: Sequence[SectionInfo]) -> list[Fold]:
    """One fold per patient: train on its first section, test on its others. Patients with one section are left out.

    Raises
    ------
    InputError
        No patient has two sections.
    """
    return [Fold(patient, names[:1], (), names[1:]) for patient, names in _with_siblings(sections, "first_section")]


def leave_one_section_out(sections: Sequence[SectionInfo]) -> list[Fold]:
    """One fold per section: train on the patient's other sections. Patients with one section are left out.

    Raises
    ------
    InputError
        No patient has two sections.
    """
    return [
        Fold(tested, tuple(name for name in names if name != tested), (), (tested,))
        for _, names in _with_siblings(sections, "leave_one_section_out")
        for tested in names
    ]


PROTOCOLS: dict[str, Protocol] = {
    "patient_folds": Protocol(patient_folds, False, "folds of whole patients (the paper's 2D protocol)"),
    "first_section": Protocol(
        first_section, True, "per patient, trained on its first section, tested on its others (the paper's 3D protocol)"
    ),
    "leave_one_section_out": Protocol(
        leave_one_section_out, True, "each section tested, trained on the other sections of its patient"
    ),
    "leave_one_patient_out": Protocol(leave_one_patient_out, False, "each patient tested, trained on all others"),
}


def protocol(name: str) -> Protocol:
    """Look a protocol up by name."""
    if name not in PROTOCOLS:
        raise InputError(f"protocol={name!r} is unknown; use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def check_leak(
    fold: Fold,
    infos: Sequence[SectionInfo],
    digests: Mapping[str, Mapping[str, str]],
    same_patient: bool = False,
) -> None:
    """Refuse a fold in which what is tested was seen in training.

    Parameters
    ----------
    infos
        All sections of the study.
    digests
        What -> section -> digest of it, where the section has it: of its image, of its counts.
    same_patient
        Whether the protocol trains on the tested patient by design; sections, images and counts may still not repeat.

    Raises
    ------
    InputError
        A section, an image or counts stand in two of train, validation and test; a tested patient is trained or
        validated on and ``same_patient`` is false; or the fold names a section that ``infos`` lacks.
    """
    patient_of = {info.name: info.patient for info in infos}
    parts = {"train": fold.train, "validation": fold.validation, "test": fold.test}
    unknown = [name for names in parts.values() for name in names if name not in patient_of]
    if unknown:
        raise InputError(f"fold {fold.name} names section {unknown[0]}, which the data lack; use names of its sections")
    for (one, ones), (other, others) in combinations(parts.items(), 2):
        shared = sorted(set(ones) & set(others))
        if shared:
            raise InputError(_leak(fold, f"section {shared[0]} stands in {one} and in {other}"))
        for what, of in digests.items():
            holders = {of[name]: name for name in ones if name in of}
            for name in others:
                twin = holders.get(of.get(name, ""))
                if twin:
                    raise InputError(_leak(fold, f"section {twin} in {one} and {name} in {other} have the same {what}"))
    if not same_patient:
        seen = sorted({patient_of[name] for name in fold.outside_test} & {patient_of[name] for name in fold.test})
        if seen:
            raise InputError(_leak(fold, f"patient {seen[0]} is trained and tested on"))


def _leak(fold: Fold, what: str) -> str:
    return f"fold {fold.name} leaks: {what}; keep them on one side, or switch the leak check off and say so"


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Sort key under which S2 comes before S10."""
    parts = [part for part in re.split(r"([0-9]+)", text) if part]
    return [(False, int(part), part) if part[0] in "0123456789" else (True, 0, part) for part in parts]


def _by_patient(sections: Sequence[SectionInfo]) -> dict[str, tuple[str, ...]]:
    """Names of the sections of each patient; patients and sections in natural order."""
    names = [info.name for info in sections]
    if not names:
        raise InputError("a protocol needs sections; none was given")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"section {twice} stands more than once; section names must be unique")
    patients = sorted({info.patient for info in sections}, key=_natural)
    return {
        patient: tuple(sorted((info.name for info in sections if info.patient == patient), key=_natural))
        for patient in patients
    }


def _with_siblings(sections: Sequence[SectionInfo], protocol_name: str) -> list[tuple[str, tuple[str, ...]]]:
    found = [(patient, names) for patient, names in _by_patient(sections).items() if len(names) > 1]
    if not found:
        raise InputError(
            f"protocol {protocol_name} needs a patient with at least 2 sections; none of the {len(sections)} sections "
            "has a sibling, so use a protocol between patients"
        )
    return found


def _between_patients(
    by_patient: Mapping[str, tuple[str, ...]], groups: Sequence[tuple[str, ...]], protocol_name: str
) -> list[Fold]:
    if len(groups) < 2:
        raise InputError(
            f"protocol {protocol_name} makes {len(groups)} fold of the patients {', '.join(by_patient)}; "
            "at least 2 are needed, so add patients, or use first_section or leave_one_section_out"
        )
    folds = []
    for i, group in enumerate(groups):
        others = [patient for patient in by_patient if patient not in group]
        aside = [groups[(i + 1) % len(groups)][0]] if len(others) > LEAST_TRAINING_PATIENTS else []
        train = [patient for patient in others if patient not in aside]
        folds.append(Fold("+".join(group), *(_sections(by_patient, part) for part in (train, aside, group))))
    return folds


def _sections(by_patient: Mapping[str, tuple[str, ...]], patients: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for patient in patients for name in by_patient[patient])
