"""The table of a benchmark: its order, its standing and its costs; and its page, on which every name is only text."""

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hifusion.comparison import gene_wins, paired_differences, selection_gap
from hifusion.errors import InputError
from hifusion.leaderboard import COLUMNS, COSTS, leaderboard
from hifusion.leaderboard_page import to_html, to_markdown
from scoreboard import result_of, rows

EVIL = "<img src=x onerror=alert(1)>"


def study(patients: int = 8, network: str = "hifusion") -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """A network of two seeds that leads, a rival close behind, a weak one, a null and an oracle above them all."""
    random = np.random.default_rng(0)
    means = {
        ("train_mean", None): np.nan,
        ("depth", None): 0.8,
        ("ridge", None): 0.2,
        ("shuffled", 0): 0.0,
        (network, 0): 0.50,
        (network, 1): 0.51,
        ("stnet", 0): 0.50,
        ("stnet", 1): 0.49,
    }
    genes, sections = rows({key: random.normal(mean, 0.02, (patients, 2)) for key, mean in means.items()})
    return result_of(genes, sections), genes, sections


def page(how: Any, patients: int = 8, network: str = "hifusion", costs: pd.DataFrame | None = None) -> str:
    result, genes, sections = study(patients, network)
    board = leaderboard(result, genes, sections, costs)
    gap = selection_gap(sections, sections)
    return how(result, board, paired_differences(genes, sections), gene_wins(genes), gap)


def costs_of(**changes: Any) -> pd.DataFrame:
    """Two folds of a network, the second of them twice as dear."""
    one = {"model": "hifusion", "label": "hifusion-seed0", "seed": 0, "fold": "P0", **dict.fromkeys(COSTS, 100.0)}
    return pd.DataFrame([one, one | {"fold": "P1", **dict.fromkeys(COSTS, 200.0)} | changes])


def test_honest_models_come_by_falling_correlation_and_oracles_last():
    board = leaderboard(*study())
    assert board["model"].iloc[0] in ("hifusion", "stnet")
    assert board["model"].tolist()[2:3] == ["ridge"] and board["model"].iloc[-1] == "depth"
    assert board["kind"].tolist() == ["network", "network", "simple rival", "null", "null", "oracle"]
    assert (board["pcc_per_gene"].iloc[-1] > board["pcc_per_gene"].iloc[:-1]).all()


def test_every_column_is_there_with_the_interval_behind_its_score():
    board = leaderboard(*study())
    assert set(board) - set(COLUMNS) == {"pcc_per_gene_low", "pcc_per_gene_high"}
    low, value, high = (board.iloc[0][f"pcc_per_gene{end}"] for end in ("_low", "", "_high"))
    assert low < value < high


def test_each_model_is_held_against_the_best():
    board = leaderboard(*study()).set_index("model")["against_best"]
    assert board.iloc[0] == "best"
    assert board.iloc[1] == "not told apart"
    assert board[["ridge", "train_mean"]].tolist() == ["differ", "differ"]
    assert board["shuffled"] == "too few seeds"
    assert board["depth"] == ""


def test_oracles_alone_make_no_leaderboard():
    genes, sections = rows({("depth", None): np.full((6, 2), 0.8), ("own_mean", None): np.full((6, 2), 0.1)})
    with pytest.raises(InputError, match="no models to compare"):
        leaderboard(result_of(genes, sections), genes, sections)


def test_costs_are_means_over_folds_and_memory_is_the_largest():
    board = leaderboard(*study(), costs_of()).set_index("model")
    assert board.loc["hifusion", ["train_seconds", "gflop_per_spot", "peak_memory_mib"]].tolist() == [150, 150, 200]
    assert board.loc["hifusion", "parameters_m"] == pytest.approx(150 / 1e6)
    assert board.loc["ridge", ["train_seconds", "parameters_m", "peak_memory_mib"]].isna().all()


def test_a_fold_without_a_figure_does_not_undo_the_others():
    board = leaderboard(*study(), costs_of(train_seconds=np.nan)).set_index("model")
    assert board.loc["hifusion", "train_seconds"] == 100


def test_cost_columns_are_shown_only_where_there_are_costs():
    assert "GFLOP" not in page(to_html) and "GFLOP" in page(to_html, costs=costs_of())


@pytest.mark.parametrize("how", [to_html, to_markdown])
def test_the_page_says_which_models_are_not_told_apart_from_the_best(how):
    standing = r"Highest pcc_per_gene: (\w+)\. Against it not told apart: (\w+); too few seeds: shuffled\."
    found = re.search(standing, page(how))
    assert found and set(found.groups()) == {"hifusion", "stnet"}


@pytest.mark.parametrize("how", [to_html, to_markdown])
def test_few_patients_are_said_to_be_too_few(how):
    assert "Only 4 patients: below 6 no two models can be told apart" in page(how, patients=4)
    assert "Only" not in page(how)


@pytest.mark.parametrize("how", [to_html, to_markdown])
def test_cautions_of_the_evaluation_stand_on_the_page(how):
    result, genes, sections = study()
    result["protocol"]["same_patient"] = True
    text = how(result, leaderboard(result, genes, sections), paired_differences(genes, sections), gene_wins(genes))
    assert "Same patient:" in text and "****" not in text


class Elements(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_names_are_shown_as_text_and_the_page_loads_and_runs_nothing():
    result, genes, sections = study(network=EVIL)
    result["protocol"] |= {"name": EVIL, "meaning": EVIL}
    result |= {"left_out": [EVIL], "not_run": {EVIL: EVIL}}
    gap = selection_gap(sections, sections)
    board, pairs = leaderboard(result, genes, sections), paired_differences(genes, sections)
    found = Elements(to_html(result, board, pairs, gene_wins(genes), gap))
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"img", "script", "link", "iframe", "a", "form", "object", "base"}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on") or name == "style"]
    assert EVIL in found.text
    policy = next(its["content"] for tag, its in found.tags if tag == "meta" and "http-equiv" in its)
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "<img" not in to_markdown(result, board, pairs, gene_wins(genes), gap)


def test_a_bar_or_link_in_a_name_makes_no_cell_and_no_link():
    text = page(to_markdown, network="[x](javascript:1)|y")
    widths = {
        line.replace("\\|", "").count("|") for line in text.splitlines() if "javascript" in line and line[0] == "|"
    }
    plain = {line.count("|") for line in page(to_markdown).splitlines() if "hifusion" in line and line[0] == "|"}
    assert widths == plain
    assert not re.search(r"(?<!\\)\[x", text)


def test_the_matrix_shows_both_sides_of_a_pair_and_which_is_better():
    matrix = page(to_markdown).split("## Pairs")[1].split("## Every pair")[0]
    rows_of = {cells[1].strip(): cells for cells in (line.split("|") for line in matrix.splitlines() if "|" in line)}
    ridge = [cell.strip() for cell in rows_of[""]].index("ridge")
    network = [cell.strip() for cell in rows_of[""]].index("hifusion")
    assert rows_of["hifusion"][ridge].strip().startswith("▲ +0.")
    assert rows_of["ridge"][network].strip().startswith("▼ -0.")


def test_in_an_error_the_lower_model_is_the_better_one():
    result, genes, sections = study()
    pairs = paired_differences(genes, sections, "mse")
    text = to_markdown(result, leaderboard(result, genes, sections), pairs, gene_wins(genes))
    matrix = text.split("## Pairs")[1].split("## Every pair")[0]
    assert re.search(r"\| hifusion \|.*▲ -0\.", matrix) and "Row minus column in mse" in matrix
