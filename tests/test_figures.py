"""Figures of an evaluation: which points stand where, in which order, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from fabricate import lattice_section, refused
from hifusion import figures, files, metrics
from hifusion.figures import (
    plot_2d_against_3d,
    plot_gene_scatter,
    plot_moran_retention,
    plot_paper_figure3,
    plot_skill_distribution,
)
from hifusion.section import predicted_section, write_section

GENES = ("ERBB2", "KRT19", "CD74", "TMSB10")
N = 24
LABELS = ("hifusion-seed0", "hifusion-seed1", "own_mean", "ridge", "train_mean")


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved while the test runs."""
    seen: list[Figure] = []
    real = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, out, dpi: (seen.append(figure), real(figure, out, dpi))[1])
    return seen


def truth(name: str) -> np.ndarray:
    return np.random.default_rng(ord(name[0])).normal(size=(N, len(GENES))).astype(np.float32)


def guess(label: str, name: str) -> np.ndarray:
    """The network is half of what was measured, everything else is flat."""
    return 0.5 * truth(name) if label.startswith("hifusion") else np.full((N, len(GENES)), 0.25, dtype=np.float32)


def write_evaluation(
    root: Path, sections: tuple[str, ...] = ("A1", "B1"), same_patient: bool = False, shift: float = 0.0
) -> Path:
    """What `hifusion evaluate` leaves, as far as the figures read it; `shift` is another panel's unit."""
    rows = []
    for name in sections:
        section = lattice_section({gene: np.ones(N, dtype=int) for gene in GENES}, name)
        measured, centres = truth(name) + np.float32(shift), section.obsm["spatial"]
        for label in LABELS:
            values = guess(label, name)
            made = predicted_section(
                section, values, genes=GENES, normalisation="log_share", panel_digest="d", run=label
            )
            made.layers["measured"] = measured
            write_section(made, root / "predictions" / label / f"{name}.h5ad")
            pitch = centres[1, 0] - centres[0, 0]
            scores = metrics.score_section(values, measured, measured.mean(0), centres, pitch, GENES, np.full(4, 0.8))
            rows.append(
                scores.genes.assign(model=label.split("-")[0], label=label, fold=name[0], section=name, patient=name[0])
            )
    files.write_text(root / "metrics.csv", pd.concat(rows).to_csv(index=False))
    models = {"own_mean": {"oracle": True}, "ridge": {"oracle": False}}
    protocol = {"name": "some_protocol", "same_patient": same_patient}
    files.write_json(root / "metrics.json", {"models": models, "protocol": protocol})
    return root


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("figures") / "evaluation")


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def maps(figure: Figure) -> list[str]:
    """First lines of the panels that are maps."""
    return [
        ax.get_title().split("\n")[0]
        for ax in figure.axes
        if any(isinstance(part, EllipseCollection) for part in ax.collections)
    ]


def test_scatter_shows_every_spot_by_section_with_the_mse_over_spots_and_the_mean_correlation(evaluation, drawn):
    """Half of the truth: correlation 1, MSE a quarter of the mean square."""
    out = plot_gene_scatter(evaluation, evaluation / "scatter.png", genes=["CD74", "ERBB2"], dpi=50)
    both = np.concatenate([truth(name)[:, 2] for name in ("A1", "B1")])
    assert out.stat().st_size > 0
    assert titles(drawn[0])[0] == f"CD74\npcc_per_gene +1.00   MSE {np.square(both).mean() / 4:.3f}"
    points = drawn[0].axes[0].collections
    assert [its.get_label() for its in points] == ["A1", "B1"]
    np.testing.assert_allclose(points[1].get_offsets(), np.column_stack([truth("B1")[:, 2], 0.5 * truth("B1")[:, 2]]))
    assert drawn[0].get_suptitle() == "hifusion-seed0  ·  2 sections"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["A1", "B1"]


def test_scatter_counts_the_correlation_of_a_flat_map_as_0_and_takes_the_sections_asked_for(evaluation, drawn):
    plot_gene_scatter(evaluation, evaluation / "s.png", model="train_mean", genes=["CD74"], sections=["B1"], dpi=50)
    assert titles(drawn[0])[0].split("\n")[1].startswith("pcc_per_gene +0.00")
    assert [its.get_label() for its in drawn[0].axes[0].collections] == ["B1"]


def test_skill_has_a_row_per_model_floor_first_ceiling_last_without_oracles(evaluation, drawn):
    plot_skill_distribution(evaluation, evaluation / "skill.svg")
    (ax,) = drawn[0].axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["train_mean", "ridge", "hifusion", "ceiling"]
    assert [text.get_text() for text in ax.texts] == ["+0.000", "+0.000", "+1.000", "+0.800", "mean"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first row is on top"


def test_skill_and_moran_show_the_models_asked_for(evaluation, drawn):
    plot_skill_distribution(evaluation, evaluation / "skill.png", models=["own_mean", "hifusion-seed1"], dpi=50)
    labels = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["own_mean", "hifusion", "ceiling"]
    with refused("model 'hifusin'", "hifusion"):
        plot_moran_retention(evaluation, evaluation / "moran.png", models=["hifusin"])


def test_moran_of_a_scaled_map_is_that_of_the_measured_and_constant_maps_are_counted(evaluation, drawn):
    plot_moran_retention(evaluation, evaluation / "moran.png", dpi=50)
    assert [title.split("\n")[0] for title in titles(drawn[0])] == ["train_mean", "ridge", "hifusion"]
    assert titles(drawn[0])[0].endswith("4 of 4 maps constant")
    points = drawn[0].axes[2].collections[0].get_offsets()
    assert points.shape == (4, 2)
    np.testing.assert_allclose(points[:, 0], points[:, 1], atol=1e-6)


def test_figure_3_has_a_row_per_gene_and_the_nulls_last_named_as_such(evaluation, drawn):
    plot_paper_figure3(evaluation, evaluation / "figure3.png", section="B1", dpi=50)
    row = ["measured", "hifusion-seed0", "null: train_mean", "null: ridge"]
    assert maps(drawn[0]) == row * 3
    assert [ax.get_ylabel() for ax in drawn[0].axes if ax.get_ylabel()] == ["ERBB2", "KRT19", "CD74"]
    assert drawn[0].texts[0].get_text().startswith("Section B1")


@pytest.mark.parametrize("shift, extra", [(0.0, []), (1.0, ["measured, second panel"])])
def test_2d_against_3d_shows_the_first_section_tested_in_both(evaluation, tmp_path, drawn, shift, extra):
    """And the measured map of the second evaluation where its panel makes another one."""
    within = write_evaluation(tmp_path / "within", ("B1", "C1"), same_patient=True, shift=shift)
    plot_2d_against_3d(evaluation, within, tmp_path / "both.png", dpi=50)
    assert maps(drawn[0]) == ["measured", "from other patients", *extra, "from the same patient"] * 3
    assert drawn[0].texts[0].get_text().startswith("Section B1")


def test_2d_against_3d_refuses_other_kinds_of_protocol_and_folders_without_a_common_section(evaluation, tmp_path):
    other = write_evaluation(tmp_path / "other", ("C1",), same_patient=True)
    with refused("no section is tested both", "(A1, B1)", "(C1)"):
        plot_2d_against_3d(evaluation, other, tmp_path / "both.png")
    with refused("some_protocol is not between patients"):
        plot_2d_against_3d(other, evaluation, tmp_path / "both.png")
    assert not (tmp_path / "both.png").exists()


@pytest.mark.parametrize(
    "draw, word",
    [
        (plot_gene_scatter, "no predictions"),
        (plot_skill_distribution, "metrics.csv"),
        (plot_moran_retention, "metrics.csv"),
        (plot_paper_figure3, "no predictions"),
    ],
)
def test_a_folder_that_is_no_evaluation_and_a_file_that_is_no_picture_are_refused(
    tmp_path: Path, draw: Callable[..., Path], word: str
):
    with refused(word):
        draw(tmp_path, tmp_path / "out.png")
    with refused("out.txt", ".png"):
        draw(tmp_path, tmp_path / "out.txt")
    assert not list(tmp_path.iterdir())


def test_a_gene_section_or_model_that_is_not_there_is_refused(evaluation, tmp_path):
    for wrong, words in (
        ({"genes": ["ERBB3"]}, ("gene 'ERBB3'", "ERBB2")),
        ({"sections": ["A9"]}, ("section 'A9'", "A1")),
        ({"model": "ridg"}, ("model 'ridg'", "ridge")),
    ):
        with refused(*words):
            plot_gene_scatter(evaluation, tmp_path / "out.png", **wrong)
