"""Published figures beside ours: the rows of Table 1, and how far the two can be compared."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from hifusion.contest import TEST_EPOCH
from hifusion.reporting import cautions
from hifusion.studies import METHODS, Figures, Study

SCORES = {"mse": "MSE", "mae": "MAE", "pcc_per_spot": "pcc_per_spot"}
"""What the paper publishes -> its title."""
_LEGEND = (
    "Difference: ours - published; below 0 is better for MSE and MAE, above 0 for pcc_per_spot (across the genes of a "
    "spot, the paper's PCC). pcc_per_gene, across the spots of a section, is not published. Rows without published "
    "figures are this package's nulls and simple rivals: read no network without them. \\* oracle: looks at the tested "
    "section's own measurements, a yardstick and no method."
)
_NOT_KNOWN = Figures(float("nan"), float("nan"), float("nan"))


def table_of(its: Study, result: dict[str, Any]) -> pd.DataFrame:
    """The paper's methods in its order, then every other model that was scored, oracles last.

    Parameters
    ----------
    result
        What ``metrics.json`` holds.

    Returns
    -------
    DataFrame
        ``method, model, seeds``; for each of :data:`SCORES` ``published_, ours_, difference_`` (ours - published);
        ``ours_pcc_per_gene``, which the paper has no table of. NaN where there is no figure.
    """
    scored = result["models"]
    shown = [model for name in METHODS for model in (name, f"{name}{TEST_EPOCH}") if model in (*METHODS, *scored)]
    others = sorted((model for model in scored if model not in shown), key=_place(result))
    return pd.DataFrame([_row(its, model, scored.get(model)) for model in (*shown, *others)])


def _place(result: dict[str, Any]) -> Any:
    """Sort key: other networks, nulls and simple rivals as they were scored, the shuffled null behind, then oracles."""
    order = list(result["models"])

    def key(model: str) -> tuple[bool, bool, int]:
        its = result["models"][model]
        return its["oracle"], its["null"], order.index(model)

    return key


def _row(its: Study, model: str, scores: dict[str, Any] | None) -> dict[str, Any]:
    published = its.published.get(model.removesuffix(TEST_EPOCH), _NOT_KNOWN)
    title = METHODS.get(model.removesuffix(TEST_EPOCH), model)
    ours = {key: float("nan") if scores is None else scores[key] for key in SCORES}
    return {
        "method": f"{title}, epoch selected on the test" if model.endswith(TEST_EPOCH) else title,
        "model": model,
        "oracle": bool(scores and scores["oracle"]),
        "seeds": 0 if scores is None or scores["null"] else max(1, len(scores["by_seed"])),
        **{
            name: figure
            for key in SCORES
            for name, figure in (
                (f"published_{key}", getattr(published, key)),
                (f"ours_{key}", ours[key]),
                (f"difference_{key}", ours[key] - getattr(published, key)),
            )
        },
        "ours_pcc_per_gene": float("nan") if scores is None else scores["pcc_per_gene_mean"],
    }


def comparability(
    its: Study, result: dict[str, Any], panel: str, overrides: Sequence[str], failed: dict[str, str]
) -> list[str]:
    """How far our figures can be compared with the published ones, a sentence of Markdown each.

    Parameters
    ----------
    panel
        The study's own, as a recipe names it.
    overrides
        Values of the recipe that were changed.
    failed
        Job -> reason.
    """
    scores, recipe = next(iter(result["models"].values())), result["recipe"]
    used = sorted({name for fold in result["folds"] for part in ("train", "validation", "test") for name in fold[part]})
    spots = f"{scores['n_spots']:,}" + (f" of {its.n_spots:,}" if its.n_spots else "")
    networks = {name: METHODS.get(name, name) for name in result["recipes"]}
    missed = [METHODS[name] for name in its.published if name not in result["models"]]
    reasons = [
        f"only {len(used)} of {its.n_sections} sections" if len(used) < its.n_sections else "",
        f"recipe {recipe['name']}, not {its.recipe}" if networks and recipe["name"] != its.recipe else "",
        f"changed values ({', '.join(overrides)})" if networks and overrides else "",
        f"another gene panel ({recipe['panel']})" if recipe["panel"] != panel else "",
    ]
    differs = "; ".join(reason for reason in reasons if reason)
    notes = [
        f"Run: {len(used)} of {its.n_sections} sections ({', '.join(used)}), {len(result['folds'])} of {its.n_folds} "
        f"folds. Tested: patients {scores['n_patients']}, sections {scores['n_sections']}, spots {spots}.",
        f"**Not comparable with the published column:** {differs}."
        if differs
        else "Sections and recipe are those of the published column.",
        _panel_note(its, result, panel),
    ]
    if networks:
        epochs = ", ".join(f"{title} {result['recipes'][name]['epochs']}" for name, title in networks.items())
        notes += [f"Recipe `{recipe['name']}` (source: {recipe['source']}); epochs: {epochs}.", _selection(result)]
    if networks.keys() - {"hifusion"}:
        notes.append(
            "Rivals are implemented anew and start from random weights; those that take features of a frozen encoder "
            f"have them from `{recipe['encoder']}`."
        )
    if missed:
        notes.append(f"Not scored here: {', '.join(missed)}.")
    one = [title for name, title in networks.items() if name in result["models"] and not _several(result, name)]
    if one:
        notes.append(f"One seed, so that luck cannot be told from skill: {', '.join(one)}.")
    return [
        *notes,
        *cautions(result),
        *(f"Failed: {job} ({reason})." for job, reason in failed.items()),
    ]


def _several(result: dict[str, Any], model: str) -> bool:
    return bool(result["models"][model]["by_seed"])


def _panel_note(its: Study, result: dict[str, Any], panel: str) -> str:
    fold, ours = result["folds"][0], result["recipe"]["panel"] != panel
    if its.panel != "paper" and not ours:
        chosen = f"by the paper's rule on all {its.n_sections} sections of the full table, tested ones included"
    elif fold["panel_rule"] == "paper":
        chosen = "by the paper's rule on the sections run here, tested ones included"
    else:
        chosen = f"by the rule {fold['panel_rule']}"
    unknown = "" if its.panel != "paper" else "; the published panel is not at hand"
    return f"Panel: {fold['n_genes']} genes (digest {fold['panel_digest']}), chosen {chosen}{unknown}."


def _selection(result: dict[str, Any]) -> str:
    repeated = any(model.endswith(TEST_EPOCH) for model in result["models"])
    return (
        "Epoch: ours is selected on spots or sections outside the test, or is the last where a recipe says so; the "
        "published one is the best of all on the tested fold. "
        + ('Rows "epoch selected on the test" repeat that habit.' if repeated else "`--test-epoch` repeats that habit.")
    )


def to_markdown(title: str, notes: Sequence[str], table: pd.DataFrame) -> str:
    """The page: title, notes, table."""
    headers = [
        "method",
        *(f"{name} {what}" for name in SCORES.values() for what in ("published", "ours", "difference")),
    ]
    headers += ["pcc_per_gene ours", "seeds"]
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" + " ---: |" * (len(headers) - 1)]
    for _, row in table.iterrows():
        cells = [f"{row['method']} \\*" if row["oracle"] else str(row["method"])]
        for key in SCORES:
            cells += [_number(row[f"{what}_{key}"]) for what in ("published", "ours")]
            cells.append(_number(row[f"difference_{key}"], "+"))
        cells += [_number(row["ours_pcc_per_gene"]), str(row["seeds"] or "-")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n\n".join([f"# {title}", "\n".join(f"- {note}" for note in notes), "\n".join(lines), _LEGEND]) + "\n"


def _number(value: float, sign: str = "") -> str:
    return "-" if pd.isna(value) else f"{value:{sign}.4f}"
