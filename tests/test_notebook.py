"""In a notebook: plots draw on the axes they are given and return them, and objects say what they are in a line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fabricate import write_her2st
from hifusion import api, curves, figures
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort
from hifusion.expression import GenePanel
from test_curves import write_run
from test_report import SMALL, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("notebook") / "evaluation")


DRAW: dict[str, Callable[..., Axes]] = {
    "gene_skill": curves.gene_skill,
    "error_split": curves.error_split,
    "skill_distribution": figures.skill_distribution,
    "gene_scatter": lambda folder, ax: figures.gene_scatter(folder, "ERBB2", ax=ax),
}


@pytest.mark.parametrize("name", DRAW)
def test_a_plot_draws_on_the_axes_it_is_given_and_returns_them(study, name):
    figure = Figure()
    given = figure.subplots()
    assert DRAW[name](study, ax=given) is given
    assert given.has_data() and figure.axes == [given]


@pytest.mark.parametrize("name", DRAW)
def test_a_plot_without_axes_makes_its_own(study, name):
    from matplotlib import pyplot as plt

    ax = DRAW[name](study, ax=None)
    try:
        assert ax.figure.number in plt.get_fignums()
    finally:
        plt.close(ax.figure)


def test_learning_draws_either_half(tmp_path):
    run = write_run(tmp_path / "run")
    left, right = Figure().subplots(1, 2)
    assert [line.get_label() for line in curves.learning(run, ax=left).lines] == ["total", "final"]
    assert curves.learning(run, validation=True, ax=right).get_title() == "validation MSE"


def test_a_run_a_panel_and_a_cohort_say_what_they_are(tmp_path):
    api.prepare(write_her2st(tmp_path / "raw"), tmp_path / "store", recipe="tiny", region_px=32)
    run = api.train(tmp_path / "store", tmp_path / "run", recipe="tiny", overrides=SMALL, sections=["A1"])
    assert repr(run) == repr(Run.open(tmp_path / "run"))
    assert "hifusion by recipe tiny, 10 genes from" in repr(run) and "spots of A1; epoch" in repr(run)
    assert "4 sections (patients A, B), 3 with region patches: A1, A2, B1, B2" in repr(Cohort.open(tmp_path / "store"))
    assert repr(GenePanel(tuple("ABCDEF"), "file")) == "GenePanel of 6 genes (file): A, B, C, D, ..."
