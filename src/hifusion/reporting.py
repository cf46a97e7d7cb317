"""The evaluation as a page of Markdown: the table with its nulls, and what it does and does not mean."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

MARKERS = ("ERBB2", "KRT19", "CD74", "TMSB10")  # the genes of the paper's maps

# Column title -> key of a model's scores, decimals.
_COLUMNS: dict[str, tuple[str, int]] = {
    "MSE": ("mse", 4),
    "MAE": ("mae", 4),
    "pcc_per_spot": ("pcc_per_spot", 4),
    "pcc_per_gene": ("pcc_per_gene_mean", 3),
    "median": ("pcc_per_gene_median", 3),
    "of ceiling": ("fraction_of_ceiling", 3),
    "Spearman": ("spearman_per_gene_mean", 3),
    "R2": ("r2_mean", 3),
    "MSE offset": ("mse_offset", 4),
    "MSE pattern": ("mse_pattern", 4),
    "Moran's I": ("moran_prediction", 2),
    "variance": ("variance_ratio", 2),
    "SSIM": ("ssim", 2),
}

# What fits a terminal.
BRIEF = ("MSE", "MAE", "pcc_per_spot", "pcc_per_gene", "of ceiling")


def table(result: dict[str, Any], columns: Sequence[str] = tuple(_COLUMNS)) -> str:
    """The scores of every model as a Markdown table, nulls first, with an interval for ``pcc_per_gene``."""
    lines = [_row(["model", *columns]), _row(["---", *["---:"] * len(columns)])]
    for name, scores in result["models"].items():
        cells = [_number(scores[key], decimals) for key, decimals in map(_COLUMNS.__getitem__, columns)]
        interval = scores["intervals"]["pcc_per_gene_mean"]
        if interval:
            cells[columns.index("pcc_per_gene")] += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        seeds = f" ({len(scores['by_seed'])} seeds)" if scores["by_seed"] else ""
        lines.append(_row([f"{name}{' *' if scores['oracle'] else ''}{seeds}", *cells]))
    return "\n".join(lines)


def markdown(result: dict[str, Any], genes: pd.DataFrame) -> str:
    """The whole page. ``genes`` are the rows of ``metrics.csv``."""
    any_model = next(iter(result["models"].values()))
    recipe = result["recipe"]
    parts = [
        "# Evaluation",
        f"Protocol `{result['protocol']['name']}`: {result['protocol']['meaning']}. "
        f"{len(result['folds'])} folds, {any_model['n_sections']} tested sections of {any_model['n_patients']} "
        f"patients, {any_model['n_spots']} spots, {result['folds'][0]['n_genes']} genes, "
        f"expression `{recipe['normalisation']}`.",
        *cautions(result),
        table(result),
        _legend(result),
        _coverage(result),
        _verdict(result),
        "## Genes",
        _genes(result, genes),
        "## Folds",
        "\n".join(
            f"- {fold['name']}: trained on {', '.join(fold['train'])}; selected on "
            f"{', '.join(fold['validation']) or 'left-out spots of the training sections'}; "
            f"tested on {', '.join(fold['test'])}"
            for fold in result["folds"]
        ),
        f"Recipe `{recipe['name']}` (source: {recipe['source']}). Versions: "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _coverage(result: dict[str, Any]) -> str:
    """How many measurements the intervals hold, of the models that give any."""
    known = {name: its["coverage_90"] for name, its in result["models"].items() if its.get("coverage_90") is not None}
    held = ", ".join(f"{100 * share:.1f} % ({name})" for name, share in known.items())
    return f"Measurements within the 90 % intervals: {held}." if known else ""


def cautions(result: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures, a sentence of Markdown each."""
    found = []
    if result["protocol"]["same_patient"]:
        found.append(
            "**Same patient:** tested sections are of patients that were trained on. "
            "This says nothing about a new patient."
        )
    if any(fold["panel_rule"] == "paper" for fold in result["folds"]):
        panel = result["recipe"]["panel"]
        found.append(f"**Panel:** chosen on all sections, tested ones included, as in the paper (`panel={panel}`).")
    if not result["leak_check"]:
        found.append("**The leak check was switched off.**")
    if result["left_out"]:
        found.append(
            f"Not used ({len(result['left_out'])} sections without region patches): {', '.join(result['left_out'])}."
        )
    found += [f"Not run: `{name}` ({reason})." for name, reason in result["not_run"].items()]
    return found


def unmarked(text: str) -> str:
    """A sentence of :func:`cautions` as plain text."""
    return text.replace("**", "").replace("`", "")


def _legend(result: dict[str, Any]) -> str:
    any_model = next(iter(result["models"].values()))
    over = any_model["interval_over"]
    interval = f"In brackets: 95 % bootstrap interval over {over}. " if over else "One section: no interval. "
    return (
        "\\* oracle: looks at the tested section's own measurements, a yardstick and no method. "
        + interval
        + "`pcc_per_gene`: across spots, mean over genes; an undefined correlation (constant map or gene) counts as 0. "
        "`of ceiling`: share of the correlation that counting noise leaves possible. `pcc_per_spot`: across genes, the "
        "paper's PCC. MSE = offset (section mean) + pattern (within section). Moran's I and variance (predicted over "
        f"measured) show smoothing; measured Moran's I is {_number(any_model['moran_truth'], 2)}."
    )


def _verdict(result: dict[str, Any]) -> str:
    """One sentence per trained model: which of the honest nulls it beats."""
    honest = {name: scores for name, scores in result["models"].items() if scores["null"] and not scores["oracle"]}
    lines = []
    for name, scores in result["models"].items():
        if scores["null"]:
            continue
        beaten = [null for null, its in honest.items() if scores["mse"] < its["mse"]]
        lost = [null for null in honest if null not in beaten]
        lines.append(
            f"`{name}` has a lower MSE than {', '.join(beaten) or 'none of the nulls'}"
            + (f", and a higher one than {', '.join(lost)}." if lost else ".")
        )
    return " ".join(lines)


def _genes(result: dict[str, Any], genes: pd.DataFrame) -> str:
    """Marker genes and the best predicted genes of the last model, against its ceiling."""
    name = list(result["models"])[-1]
    mean = (
        genes[genes["model"] == name]
        .fillna({"pcc_per_gene": 0.0})
        .groupby("gene")[["pcc_per_gene", "mae", "ceiling"]]
        .mean()
    )
    best = mean.sort_values("pcc_per_gene", ascending=False).head(10).index
    shown = list(dict.fromkeys([*(gene for gene in MARKERS if gene in mean.index), *best]))
    undefined = result["models"][name]["n_undefined_genes"]
    lines = [
        f"`{name}`, mean over tested sections: the paper's markers, then the ten best predicted. "
        f"{undefined:.0f} of {len(mean)} genes have no correlation in at least one section.",
        "",
        _row(["gene", "pcc_per_gene", "MAE", "ceiling"]),
        _row(["---", "---:", "---:", "---:"]),
        *(
            _row([gene, *(_number(mean.loc[gene, key], 3) for key in ("pcc_per_gene", "mae", "ceiling"))])
            for gene in shown
        ),
    ]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"
