"""Learning curves and per-gene skill: what the lines are, what is refused."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from fabricate import refused
from hifusion import curves, files
from hifusion.curves import plot_gene_skill, plot_learning


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved while the test runs."""
    seen: list[Figure] = []
    real = curves.save
    monkeypatch.setattr(curves, "save", lambda figure, out, dpi: (seen.append(figure), real(figure, out, dpi))[1])
    return seen


def write_run(root: Path, **facts: object) -> Path:
    rows = [(0, 0.1, 9.0, 8.0, 3.0, 1.0, 5.0), (1, 0.1, 4.0, 3.0, 1.5, 1.0, 5.0), (2, 0.1, 3.0, 2.0, 1.9, 1.0, 5.0)]
    columns = ["epoch", "lr", "total", "final", "validation_mse", "seconds", "spots_per_s"]
    files.write_text(root / "log.csv", pd.DataFrame(rows, columns=columns).to_csv(index=False))
    files.write_json(root / "run.json", facts)
    return root


def test_learning_shows_each_loss_term_and_marks_the_epoch_with_the_lowest_validation_mse(tmp_path, drawn):
    out = plot_learning(write_run(tmp_path / "run"), tmp_path / "learning.png", dpi=50)
    left, right = drawn[0].axes
    assert out.stat().st_size > 0
    assert [line.get_label() for line in left.lines] == ["total", "final"]
    assert list(left.lines[0].get_ydata()) == [9, 4, 3]
    assert list(right.lines[1].get_xdata()) == [1] and list(right.lines[1].get_ydata()) == [1.5]


def test_learning_marks_the_epoch_the_run_says_it_kept(tmp_path, drawn):
    plot_learning(write_run(tmp_path / "run", best_epoch=2), tmp_path / "learning.png", dpi=50)
    assert drawn[0].axes[1].lines[1].get_label() == "epoch 2: 1.9000"


def write_metrics(root: Path) -> Path:
    rows = [
        # model, label, patient, gene, pcc_per_gene, ceiling
        ("ridge", "ridge", "A", "G1", 0.2, 0.8), ("ridge", "ridge", "A", "G1", 0.4, 0.8),
        ("ridge", "ridge", "B", "G1", 0.5, 0.6), ("ridge", "ridge", "A", "G2", None, 0.5),
        ("ridge", "ridge", "B", "G2", 0.6, 0.5), ("depth", "depth", "A", "G1", 0.9, 0.8),
        ("net", "net-seed0", "A", "G1", 0.1, 0.8), ("net", "net-seed1", "A", "G1", 0.3, 0.8),
    ]  # fmt: skip
    columns = ["model", "label", "patient", "gene", "pcc_per_gene", "ceiling"]
    files.write_text(root / "metrics.csv", pd.DataFrame(rows, columns=columns).to_csv(index=False))
    files.write_json(root / "metrics.json", {"models": {"depth": {"oracle": True}}})
    return root


def test_gene_skill_averages_sections_then_patients_then_seeds_and_leaves_oracles_out(tmp_path, drawn):
    """ridge, G1: A .3, B .5 -> .4; G2: an undefined correlation counts 0, with .6 -> .3. net: .1 and .3 -> .2."""
    out = plot_gene_skill(write_metrics(tmp_path / "evaluation"), tmp_path / "skill.svg")
    lines = {line.get_label().split("  ")[-1]: line.get_ydata() for line in drawn[0].axes[0].lines[:3]}
    assert out.read_bytes().startswith(b"<?xml")
    assert list(lines) == ["ceiling", "ridge", "net"]
    assert list(lines["ridge"]) == pytest.approx([0.4, 0.3])
    assert list(lines["net"]) == pytest.approx([0.2])


@pytest.mark.parametrize("draw, name", [(plot_learning, "log.csv"), (plot_gene_skill, "metrics.csv")])
def test_a_folder_without_a_usable_table_is_refused(tmp_path, draw, name):
    with refused(name, "no such file"):
        draw(tmp_path, tmp_path / "out.png")
    for text, word in (("", "cannot be read"), ("a,b\n", "lacks"), ("a,b\n1,2\n", "lacks")):
        (tmp_path / name).write_text(text)
        with refused(name, word):
            draw(tmp_path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
