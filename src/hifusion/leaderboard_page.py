"""The leaderboard as one page, HTML or Markdown: cautions, table, pairs, genes won, and what every column means."""

from html import escape
from typing import Any

import pandas as pd

from hifusion.comparison import DIFFER, FEWEST_UNITS, NOT_TOLD_APART
from hifusion.leaderboard import COLUMNS, COST_COLUMNS
from hifusion.pages import Part, Table, chapters, document
from hifusion.reporting import cautions, unmarked

# What stands before the difference of a pair, so that colour is not needed to read it.
_BETTER, _WORSE, _SAME, _UNKNOWN = "▲", "▼", "≈", "?"
_MARKS = {_BETTER: "good", _WORSE: "bad"}

_STYLE = """
td { white-space: nowrap; }
tbody th { position: sticky; left: 0; background: var(--page); font-weight: 600;
  min-width: 7.5rem; max-width: 14rem; overflow-wrap: break-word; }
.text { white-space: normal; max-width: 60ch; }
@media print {
  @page { size: A4 landscape; margin: 10mm; }
  body { font-size: 9pt; } main { padding: 0; } table { font-size: 6.5pt; } th, td { padding: 1pt 3pt; }
  tbody th { min-width: 0; }
  td { white-space: normal; } }
"""


def to_html(
    result: dict[str, Any],
    board: pd.DataFrame,
    pairs: pd.DataFrame,
    wins: pd.DataFrame,
    gap: pd.DataFrame | None = None,
) -> str:
    """The page as one HTML file: no script, no network, every name shown as text; light, dark and for print.

    Parameters
    ----------
    result
        What ``metrics.json`` holds.
    board
        From :func:`hifusion.leaderboard.leaderboard`.
    pairs, wins, gap
        From :func:`hifusion.comparison.paired_differences`, ``gene_wins`` and, where there is one, ``selection_gap``.
    """
    body = chapters(_parts(result, board, pairs, wins, gap))
    return document(f"Leaderboard: {result['protocol']['name']}", body, style=_STYLE)


def to_markdown(
    result: dict[str, Any],
    board: pd.DataFrame,
    pairs: pd.DataFrame,
    wins: pd.DataFrame,
    gap: pd.DataFrame | None = None,
) -> str:
    """The same page as Markdown; arguments as :func:`to_html`."""
    lines = []
    for level, part in enumerate(_parts(result, board, pairs, wins, gap)):
        lines.append(f"{'##' if level else '#'} {_markdown(part.title)}")
        lines += [f"**{_markdown(text)}**" for text in part.warnings]
        lines += [_markdown(text) for text in part.paragraphs]
        if part.table is None:
            continue
        rows = [part.table.headers, *part.table.rows]
        table = ["| " + " | ".join(map(_markdown, row)) + " |" for row in rows]
        table.insert(1, "|" + "|".join(" --- " if text else " ---: " for text in part.table.are_text) + "|")
        lines.append("\n".join(table))
    return "\n\n".join(lines) + "\n"


def _parts(
    result: dict[str, Any], board: pd.DataFrame, pairs: pd.DataFrame, wins: pd.DataFrame, gap: pd.DataFrame | None
) -> list[Part]:
    shown = [name for name in COLUMNS if not (name in COST_COLUMNS and board[name].isna().all())]
    oracles = frozenset(board.index[board["kind"] == "oracle"])
    found = [
        Part("Leaderboard", _warnings(result, board, pairs), _about(result, board), Table(
            [COLUMNS[name].title for name in shown],
            [[_cell(row, name) for name in shown] for _, row in board.iterrows()],
            oracles,
        )),
        Part("Pairs", [], _pairs_meaning(pairs), _matrix(board, pairs)),
        Part("Every pair in figures", [], [], _pair_table(pairs)),
        Part("Genes won", [], [], Table(
            ["model", "genes", "wins", "lower MSE than train_mean", "lower MSE than ridge"],
            [
                [str(row["model"]), f"{row['genes']}", _number(row["wins"], 1)]
                + [_number(row[f"beats_{rival}"], 0) for rival in ("train_mean", "ridge")]
                for _, row in wins.set_index("model", drop=False).loc[board["model"]].iterrows()
            ],
        )),
    ]  # fmt: skip
    if gap is not None:
        found.append(_gap(gap))
    meanings = [[COLUMNS[name].title, COLUMNS[name].meaning] for name in shown if COLUMNS[name].meaning]
    return [*found, Part("What the columns mean", [], [], Table(["column", "meaning"], meanings))]


def _about(result: dict[str, Any], board: pd.DataFrame) -> list[str]:
    its = result["models"][board["model"].iloc[0]]
    protocol = result["protocol"]
    unlike = board.loc[~board["against_best"].isin(["best", DIFFER, ""])]
    rivals = [f"{verdict}: {', '.join(its)}" for verdict, its in unlike.groupby("against_best")["model"]]
    return [
        f"Protocol {protocol['name']}: {protocol['meaning']}. {len(result['folds'])} folds, {its['n_sections']:.0f} "
        f"tested sections of {its['n_patients']:.0f} patients, {its['n_spots']:.0f} spots, {its['n_genes']:.0f} genes, "
        f"expression {result['recipe']['normalisation']}.",
        f"Highest pcc_per_gene: {board['model'].iloc[0]}. "
        + (f"Against it {'; '.join(rivals)}." if rivals else "Every other honest model differs from it."),
    ]


def _warnings(result: dict[str, Any], board: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    found = [unmarked(caution) for caution in cautions(result)]
    if len(pairs) and pairs["units"].iloc[0] < FEWEST_UNITS:
        found.append(
            f"Only {pairs['units'].iloc[0]} {pairs['over'].iloc[0]}: below {FEWEST_UNITS} no two models can be told "
            "apart, and the order of the table is no finding."
        )
    once = board.loc[(board["kind"] == "network") & (board["seeds"] == 1), "model"]
    if len(once):
        found.append(f"Trained with one seed only, so that luck cannot be told from skill: {', '.join(once)}.")
    return found


def _cell(row: "pd.Series[Any]", name: str) -> str:
    if name == "model":
        return f"{row[name]} *" if row["kind"] == "oracle" else str(row[name])
    decimals = COLUMNS[name].decimals
    if decimals is None:
        return str(row[name])
    if name == "pcc_per_gene" and pd.notna(row["pcc_per_gene_low"]):
        return f"{row[name]:.3f} [{row['pcc_per_gene_low']:.3f}, {row['pcc_per_gene_high']:.3f}]"
    return "-" if name == "seeds" and not row[name] else _number(row[name], decimals)


def _pairs_meaning(pairs: pd.DataFrame) -> list[str]:
    if pairs.empty:
        return ["There is one model, and nothing to compare it with."]
    first = pairs.iloc[0]
    return [
        f"Row minus column in {first['metric']}, each the mean over seeds; {first['units']} {first['over']}. "
        f"{_BETTER} the row is better, {_WORSE} it is worse: the paired 95 % bootstrap interval over {first['over']} "
        f"excludes 0 and the difference is above 2 of its standard errors over seeds. {_SAME} not told apart. "
        f"{_UNKNOWN} cannot be told: fewer than {FEWEST_UNITS} {first['over']}, or a network trained with one seed.",
        f"Each verdict is about its own pair: of {len(pairs)} pairs without any difference about "
        f"{0.05 * len(pairs):.1f} would differ by chance. p is that of a sign-flip test over {first['over']}: none "
        f"below {FEWEST_UNITS}, and never under 2 / 2^{first['units']}. Holm's p allows for the number of pairs.",
    ]


def _mark(difference: float, metric: str, verdict: str) -> str:
    if verdict == DIFFER:
        return _BETTER if (difference > 0) == (metric != "mse") else _WORSE
    return _SAME if verdict == NOT_TOLD_APART else _UNKNOWN


def _matrix(board: pd.DataFrame, pairs: pd.DataFrame) -> Table:
    cells: dict[tuple[str, str], str] = {}
    for _, row in pairs.iterrows():
        for one, other, its in (("model_a", "model_b", row["difference"]), ("model_b", "model_a", -row["difference"])):
            cells[row[one], row[other]] = f"{_mark(its, row['metric'], row['verdict'])} {its:+.3f}"
    compared = {model for pair in cells for model in pair}
    names = [model for model in board["model"] if model in compared]
    return Table(
        ["", *names], [[one, *(cells.get((one, other), "") for other in names)] for one in names], marks=_MARKS
    )


def _pair_table(pairs: pd.DataFrame) -> Table:
    headers = ["pair", "difference", "95 % interval", "error over seeds", "p", "Holm's p", "verdict"]
    return Table(headers, [
        [
            f"{row['model_a']} - {row['model_b']}",
            f"{row['difference']:+.4f}",
            "-" if pd.isna(row["low"]) else f"[{row['low']:+.4f}, {row['high']:+.4f}]",
            *(_number(row[name], 4) for name in ("seed_error", "p", "p_holm")),
            str(row["verdict"]),
        ]
        for _, row in pairs.iterrows()
    ])  # fmt: skip


def _gap(gap: pd.DataFrame) -> Part:
    rows = [
        [row["model"], row["score"], _number(row["published"], 4), _number(row["honest"], 4), f"{row['gap']:+.4f}"]
        for _, row in gap.iterrows()
    ]
    return Part(
        "Selection on the tested fold",
        [],
        [
            "Published habit: the epoch that scored best on the tested fold. Honest: the epoch chosen on other "
            "sections. The gap is what the habit adds to a figure, and none of it is there on new data."
        ],
        Table(["model", "score", "published habit", "honest", "gap"], rows),
    )


def _markdown(text: str) -> str:
    """Plain text that Markdown shows as it is: no tags, links, code or further cells."""
    safe = escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\|*`[]" else letter for letter in safe)


def _number(value: float, decimals: int) -> str:
    return "-" if pd.isna(value) else f"{value:.{decimals}f}"
