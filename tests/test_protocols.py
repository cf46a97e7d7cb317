"""Folds: who is trained on, who is tested, and what the leak check refuses."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hifusion.errors import InputError
from hifusion.protocols import (
    PROTOCOLS,
    Fold,
    SectionInfo,
    check_leak,
    first_section,
    leave_one_patient_out,
    leave_one_section_out,
    patient_folds,
    protocol,
)

HER2 = [SectionInfo(f"{patient}{i}", patient) for patient in "ABCDEFGH" for i in range(1, 7 if patient < "E" else 4)]
BETWEEN_PATIENTS = [name for name, entry in PROTOCOLS.items() if not entry.same_patient]


@st.composite
def studies(draw: st.DrawFn, fewest_patients: int = 2, fewest_sections: int = 1) -> list[SectionInfo]:
    """Shuffled sections of some patients, numbered from 1 within each patient."""
    names = st.lists(
        st.text("PQRSxyz0123456789", min_size=1, max_size=3), min_size=fewest_patients, max_size=9, unique=True
    )
    infos = [
        SectionInfo(f"{patient}_{i}", patient)
        for patient in draw(names)
        for i in range(1, 1 + draw(st.integers(fewest_sections, 12)))
    ]
    return draw(st.permutations(infos))


def patients(names: tuple[str, ...], infos: list[SectionInfo]) -> set[str]:
    return {info.patient for info in infos if info.name in names}


def test_her2_folds_are_the_published_pairs():
    folds = patient_folds(HER2)
    assert [fold.name for fold in folds] == ["A+E", "B+F", "C+G", "D+H"]
    assert [patients(fold.test, HER2) for fold in folds] == [{"A", "E"}, {"B", "F"}, {"C", "G"}, {"D", "H"}]
    assert [patients(fold.validation, HER2) for fold in folds] == [{"B"}, {"C"}, {"D"}, {"A"}]


def test_some_of_the_her2_patients_keep_their_published_pairs():
    folds = patient_folds([info for info in HER2 if info.patient in "ABE"])
    assert [fold.name for fold in folds] == ["A+E", "B"]
    assert folds[1].train == ("A1", "A2", "A3", "A4", "A5", "A6", "E1", "E2", "E3") and folds[1].validation == ()


def test_other_patients_go_in_four_sorted_blocks():
    infos = [SectionInfo(f"P{i}.1", f"P{i}") for i in (10, 9, 1, 2, 3, 4)]
    assert [fold.name for fold in patient_folds(infos)] == ["P1+P2", "P3+P4", "P9", "P10"]
    assert [fold.name for fold in patient_folds(infos[:3])] == ["P1", "P9", "P10"]


@pytest.mark.parametrize("kept", ["C", "AE"])
def test_patients_of_one_fold_are_refused(kept):
    with pytest.raises(InputError, match="at least 2 are needed"):
        patient_folds([info for info in HER2 if info.patient in kept])


def test_first_section_trains_on_the_lowest_number_not_the_first_in_the_alphabet():
    (fold,) = first_section([SectionInfo("S10", "p"), SectionInfo("S2", "p"), SectionInfo("S11", "p")])
    assert fold == Fold("p", ("S2",), (), ("S10", "S11"))


@settings(max_examples=25)
@given(studies(fewest_sections=2))
def test_first_section_gives_one_fold_per_patient(infos):
    folds = first_section(infos)
    assert {fold.name for fold in folds} == {info.patient for info in infos}
    assert all(len(fold.train) == 1 and fold.train[0].endswith("_1") for fold in folds)
    assert sorted(name for fold in folds for name in (*fold.train, *fold.test)) == sorted(info.name for info in infos)


def test_leave_one_section_out_stays_within_the_patient():
    infos = [SectionInfo(name, name[0]) for name in ("C2", "C3", "C4", "D1")]
    folds = leave_one_section_out(infos)
    assert folds == [
        Fold("C2", ("C3", "C4"), (), ("C2",)),
        Fold("C3", ("C2", "C4"), (), ("C3",)),
        Fold("C4", ("C2", "C3"), (), ("C4",)),
    ]


@pytest.mark.parametrize("make", [first_section, leave_one_section_out])
def test_protocols_within_a_patient_need_a_sibling(make):
    with pytest.raises(InputError, match="at least 2 sections"):
        make([SectionInfo("A1", "A"), SectionInfo("B1", "B")])


def test_leave_one_patient_out_tests_each_patient_once():
    folds = leave_one_patient_out(HER2)
    assert [fold.name for fold in folds] == list("ABCDEFGH")
    assert all(patients(fold.test, HER2) == {fold.name} for fold in folds)


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(max_examples=25)
@given(infos=studies(fewest_sections=2))
def test_every_protocol_passes_its_leak_check_and_tests_a_section_at_most_once(name, infos):
    entry = protocol(name)
    folds = entry.folds(infos)
    tested = [section for fold in folds for section in fold.test]
    assert len(folds) >= 1 and len(tested) == len(set(tested))
    for fold in folds:
        assert fold.train and fold.test
        assert all(
            not set(one) & set(other) for one, other in combinations((fold.train, fold.validation, fold.test), 2)
        )
        check_leak(fold, infos, {"image": {info.name: f"image of {info.name}" for info in infos}}, entry.same_patient)


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(max_examples=25)
@given(infos=studies(fewest_sections=2))
def test_folds_do_not_depend_on_the_order_of_the_sections(name, infos):
    assert protocol(name).folds(infos) == protocol(name).folds(infos[::-1])


@pytest.mark.parametrize("name", BETWEEN_PATIENTS)
@settings(max_examples=25)
@given(infos=studies())
def test_between_patients_all_is_tested_and_validation_leaves_three_to_train_on(name, infos):
    everyone = {info.patient for info in infos}
    folds = protocol(name).folds(infos)
    assert sorted(section for fold in folds for section in fold.test) == sorted(info.name for info in infos)
    for fold in folds:
        train, validation, test = (patients(part, infos) for part in (fold.train, fold.validation, fold.test))
        assert train | validation | test == everyone and len(train) + len(validation) + len(test) == len(everyone)
        assert len(validation) == (1 if len(everyone) - len(test) >= 4 else 0)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in BETWEEN_PATIENTS])
@settings(max_examples=25)
@given(infos=studies(fewest_sections=2))
def test_within_patient_protocols_are_refused_as_leaks_unless_said(name, infos):
    assert PROTOCOLS[name].same_patient
    with pytest.raises(InputError, match="is trained and tested on"):
        check_leak(PROTOCOLS[name].folds(infos)[0], infos, {})


INFOS = [SectionInfo("A1", "A"), SectionInfo("B1", "B"), SectionInfo("B2", "B"), SectionInfo("C1", "C")]


@pytest.mark.parametrize(
    "fold, message",
    [
        (Fold("f", ("A1", "B1"), (), ("B1",)), "section B1 stands in train and in test"),
        (Fold("f", ("A1",), ("B1",), ("B1",)), "section B1 stands in validation and in test"),
        (Fold("f", ("A1",), ("A1",), ("B1",)), "section A1 stands in train and in validation"),
        (Fold("f", ("A1",), (), ("C1",)), "section A1 in train and C1 in test have the same image"),
        (Fold("f", ("B1",), (), ("X9",)), "names section X9"),
    ],
)
@pytest.mark.parametrize("same_patient", [True, False])
@pytest.mark.parametrize("what", ["image", "counts"])
def test_a_section_or_its_content_on_two_sides_is_refused_always(fold, message, same_patient, what):
    with pytest.raises(InputError, match=message.replace("image", what)):
        check_leak(fold, INFOS, {what: {"A1": "x", "C1": "x", "B1": "y"}}, same_patient)


@pytest.mark.parametrize("fold", [Fold("f", ("A1", "B1"), (), ("B2",)), Fold("f", ("A1",), ("B1",), ("B2",))])
def test_a_patient_on_two_sides_is_refused_unless_the_protocol_means_it(fold):
    with pytest.raises(InputError, match="patient B is trained and tested on"):
        check_leak(fold, INFOS, {})
    check_leak(fold, INFOS, {}, same_patient=True)


def test_sections_without_an_image_do_not_share_one():
    check_leak(Fold("f", ("A1",), (), ("C1",)), INFOS, {"image": {"B1": "y"}})


def test_bad_requests_are_one_line():
    with pytest.raises(InputError, match="use one of patient_folds, first_section"):
        protocol("2d")
    with pytest.raises(InputError, match="section A1 stands more than once"):
        patient_folds([*INFOS, INFOS[0]])
    with pytest.raises(InputError, match="none was given"):
        first_section([])
