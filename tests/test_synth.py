"""The synthetic cohort: the her2st layout to the letter, the same for a seed, and a signal that stands in the image."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hifusion import synth
from hifusion.errors import InputError
from hifusion.expression import log1p_cpm, log_share
from hifusion.readers import her2st

SMALL = {"patients": 1, "sections_per_patient": 1, "spots_per_side": 5, "genes": 24, "pitch_px": 40, "margin_px": 20}
PATCH_PX = 40  # a little more than the spot's 36 px at the default scale


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients of two sections each, at the default scale."""
    root = tmp_path_factory.mktemp("synth") / "cohort"
    assert synth.write_cohort(root, patients=3) == ["A1", "A2", "B1", "B2", "C1", "C2"]
    return root


def _image(root: Path, name: str) -> np.ndarray:
    with Image.open(root / "data/ST-imgs" / name[0] / name / f"{name}.jpg") as image:
        return np.asarray(image)


def _contents(root: Path) -> dict[str, bytes]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def _truth(root: Path) -> dict[tuple[str, str], np.ndarray]:
    with (root / "truth.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["section"], row["spot"]): np.array([float(row[kind]) for kind in synth.CELL_TYPES]) for row in rows}


def _statistics(patch: np.ndarray) -> list[float]:
    """14 simple statistics of colour and texture, nothing a network would have to be clever for."""
    value = patch / 255.0
    density = -np.log(np.maximum(value, 1 / 255)).sum(axis=2)
    edges = [np.abs(np.diff(density, axis=axis)).mean() for axis in (0, 1)]
    shares = [(density > 1.2).mean(), (value.min(axis=2) > 0.85).mean()]
    colours = [*value.mean(axis=(0, 1)), *value.std(axis=(0, 1))]
    return [*colours, *np.percentile(density, [10, 50, 90, 97]), *edges, *shares]


def _within(columns: np.ndarray) -> np.ndarray:
    return (columns - columns.mean(axis=0)) / np.maximum(columns.std(axis=0), 1e-9)


def test_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for folder, seed in (("first", 3), ("again", 3), ("other", 4)):
        synth.write_cohort(tmp_path / folder, **SMALL, seed=seed)
    first, again, other = (_contents(tmp_path / folder) for folder in ("first", "again", "other"))
    assert first == again
    counts = "data/ST-cnts/A1.tsv.gz"
    assert gzip.decompress(first[counts]) != gzip.decompress(other[counts])
    assert first[counts][4:8] == bytes(4)  # no time of writing


def test_more_patients_and_sections_leave_the_first_ones_as_they_are(tmp_path: Path) -> None:
    synth.write_cohort(tmp_path / "one", **SMALL)
    synth.write_cohort(tmp_path / "four", **SMALL | {"patients": 2, "sections_per_patient": 2})
    one, four = _contents(tmp_path / "one"), _contents(tmp_path / "four")
    first = [path for path in one if path.startswith("data/")]
    assert len(first) == 4
    assert all(one[path] == four[path] for path in first)


def test_layout_is_that_of_raw_her2st(cohort: Path) -> None:
    assert her2st.lacks(cohort) == ""
    for name in her2st.names(cohort):
        header, *rows = gzip.decompress((cohort / f"data/ST-cnts/{name}.tsv.gz").read_bytes()).decode().splitlines()
        genes = header.split("\t")
        assert genes[0] == "" and set(synth.MARKERS) < set(genes) and len(set(genes)) == 61
        positions = (cohort / f"data/ST-spotfiles/{name}_selection.tsv").read_text().splitlines()
        assert positions[0] == "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"
        fields = [line.split("\t") for line in positions[1:]]
        assert {f"{x}x{y}" for x, y, *_ in fields} == {row.split("\t")[0] for row in rows}
        values = [value for row in rows for value in row.split("\t")[1:]]
        assert all(value.isdecimal() for value in values), "counts are whole numbers, none negative"
        assert {field[-1] for field in fields} == {"1"}
        height, width, channels = _image(cohort, name).shape
        assert (height, width, channels) == (864, 864, 3)
        assert all(0 <= float(x) < width and 0 <= float(y) < height for *_, x, y, _ in fields)


def test_the_ordinary_reader_reads_it_and_finds_the_scale(cohort: Path) -> None:
    sections = list(her2st.read(cohort))
    for section in sections:
        facts = section.uns["hifusion"]
        assert facts["mpp"] == pytest.approx(200 / 72, rel=0.005)
        assert facts["patient"] == facts["section"][0]
        assert 90 <= section.n_obs <= 144
        overhang = 56 - section.obsm["spatial"].min()
        assert overhang > 0, "a 112 px region patch at the edge reaches over the image"
        assert np.median(np.asarray(section.layers["counts"].sum(axis=1))) > 2000


def test_truth_gives_shares_of_every_spot_that_add_up_to_one(cohort: Path) -> None:
    truth = _truth(cohort)
    spots = {(section.obs["section"].iloc[0], spot) for section in her2st.read(cohort) for spot in section.obs_names}
    assert set(truth) == spots
    shares = np.array(list(truth.values()))
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, atol=2.5e-4)
    assert (shares.mean(axis=0) > 0.05).all(), "every cell type is there"
    assert (shares.std(axis=0) > 0.15).all(), "and varies from spot to spot"


def test_the_label_of_a_spot_is_the_cell_type_that_takes_most_of_its_disc(cohort: Path) -> None:
    truth = _truth(cohort)
    for section in her2st.read(cohort):
        name = section.uns["hifusion"]["section"]
        most = [synth.CELL_TYPES[truth[name, spot].argmax()] for spot in section.obs_names]
        assert section.obs["label"].tolist() == most
    assert set(synth.CELL_TYPES) == set(most), "each type has spots of its own"


def test_markers_follow_their_cell_type_and_null_genes_follow_none(cohort: Path) -> None:
    truth = _truth(cohort)
    section = next(her2st.read(cohort, ["A1"]))
    counts = np.asarray(section.layers["counts"].todense())
    shares = np.array([truth["A1", spot] for spot in section.obs_names])
    for gene, kind in synth.MARKERS.items():
        share = shares[:, synth.CELL_TYPES.index(kind)]
        own = counts[:, section.var_names.get_loc(gene)] / counts.sum(axis=1)
        assert np.corrcoef(share, own)[0, 1] > 0.75, gene
    # NULL001 is the same in every type, so per richness of the ground only the spot's depth and chance are left.
    null = counts[:, section.var_names.get_loc("NULL001")] / (shares @ synth._RICHNESS)
    against = [abs(np.corrcoef(null, share)[0, 1]) for share in shares.T]
    assert max(against) < 0.3
    rare = counts[:, [name.startswith("RARE") for name in section.var_names]]
    assert 0 < (rare > 0).mean() < 0.2, "rare genes are seen in few spots"


def test_simple_statistics_of_the_patch_predict_a_patient_never_seen(cohort: Path) -> None:
    """A ridge on colour and texture exceeds 0.75 over a top-mean panel of 36; shuffled, it fails."""
    features, counts, patients = [], [], []
    for section in her2st.read(cohort):
        name, half = section.uns["hifusion"]["section"], PATCH_PX // 2
        image = np.pad(_image(cohort, name), ((half, half), (half, half), (0, 0)), constant_values=255)
        corners = np.rint(section.obsm["spatial"]).astype(int)
        patches = [image[y : y + PATCH_PX, x : x + PATCH_PX] for x, y in corners]
        features.append(_within(np.array([_statistics(patch) for patch in patches])))
        counts.append(np.asarray(section.layers["counts"].todense()))
        patients.append(name[0])
    train = [i for i, patient in enumerate(patients) if patient != "C"]
    panel = np.argsort(-np.mean([counts[i].mean(axis=0) for i in train], axis=0))[:36]
    x = np.concatenate([features[i] for i in train])
    shuffle = np.random.default_rng(0).permutation(len(x))
    for normalise in (log_share, log1p_cpm):
        y = [normalise(table[:, panel], table.sum(axis=1)) for table in counts]
        target = np.concatenate([y[i] for i in train])
        scores = {}
        for name, rows in (("ridge", slice(None)), ("shuffled", shuffle)):
            weights = np.linalg.solve(x.T @ x + 30.0 * np.eye(x.shape[1]), x.T @ (target - target.mean(axis=0))[rows])
            tested = [i for i in range(len(patients)) if i not in train]
            scores[name] = np.mean(
                [(_within(features[i] @ weights) * _within(y[i])).mean(axis=0) for i in tested], axis=0
            )
        assert scores["ridge"].mean() > 0.75, normalise.__name__
        assert (scores["ridge"] > 0.55).mean() > 0.9, "most genes of the panel carry signal"
        assert abs(scores["shuffled"].mean()) < 0.2


def test_sections_of_a_patient_share_stain_and_fields_and_patients_differ(cohort: Path) -> None:
    images = {name: _image(cohort, name).astype(float) for name in her2st.names(cohort)}
    colour = {name: image[image.min(axis=2) < 200].mean(axis=0) for name, image in images.items()}
    same = max(np.abs(colour[f"{p}1"] - colour[f"{p}2"]).max() for p in "ABC")
    others = min(np.abs(colour[f"{p}1"] - colour[f"{q}1"]).max() for p, q in ("AB", "AC", "BC"))
    assert others > 2 * same
    truth = _truth(cohort)

    def likeness(one: str, other: str) -> float:
        common = [spot for section, spot in truth if section == one and (other, spot) in truth]
        return float(np.corrcoef(*[np.array([truth[s, spot] for spot in common]).ravel() for s in (one, other)])[0, 1])

    assert min(likeness(f"{p}1", f"{p}2") for p in "ABC") > max(likeness("A1", "B1"), likeness("B1", "C1")) + 0.2


def test_progress_tells_each_section(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    synth.write_cohort(
        tmp_path / "c", **SMALL | {"patients": 2}, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"patients": 0}, "patients=0"),
        ({"patients": 27}, "patients=27"),
        ({"patients": True}, "patients=True"),
        ({"sections_per_patient": 0}, "sections_per_patient=0"),
        ({"spots_per_side": 2.5}, "spots_per_side=2.5"),
        ({"genes": 3}, "genes=3"),
        ({"seed": -1}, "seed=-1"),
        ({"pitch_px": 10}, "pitch_px=10"),
        ({"depth": 0}, "depth=0"),
        ({"margin_px": 12, "pitch_px": 72}, "margin_px=12"),
        ({"spots_per_side": 60, "pitch_px": 290, "margin_px": 200}, "17510 px"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(tmp_path: Path, wrong: dict[str, int], named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        synth.write_cohort(tmp_path / "c", **SMALL | wrong)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        synth.write_cohort(tmp_path / "mine", **SMALL)
    assert _contents(tmp_path) == {"mine/notes.txt": b"keep"}
    (tmp_path / "empty").mkdir()
    assert synth.write_cohort(tmp_path / "empty", **SMALL) == ["A1"]


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth.write_cohort(tmp_path / "c", **SMALL, progress=stop)
    assert not list(tmp_path.iterdir())
