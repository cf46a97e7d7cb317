"""The sentences and tables of a report on an evaluation, for a reader who knows tissue and not machine learning."""

from collections.abc import Sequence

import pandas as pd

from hifusion.comparison import DIFFER, NOT_TOLD_APART
from hifusion.errors import plain
from hifusion.gene_trust import RULE
from hifusion.pages import Table
from hifusion.plots import MARKERS
from hifusion.report_study import Study
from hifusion.trust_card import MEANINGS

MARKS = {"green": "good", "amber": "fair", "red": "bad"}
MOST_ROWS = 20  # genes shown without opening the whole table

GLOSSARY = (
    (
        "pcc_per_gene",
        "correlation of a gene's predicted map with its measured one, over the spots of a section: 1 is the same "
        "pattern, 0 none; a map without any pattern counts as 0",
    ),
    (
        "ceiling",
        "the correlation that a perfect prediction would reach: what was measured is itself noisy where few molecules "
        "were counted",
    ),
    (
        "MSE",
        "mean squared error, in the unit of expression; lower is better. It is the sum of offset (the whole section "
        "too high or too low) and pattern (high and low in the wrong places)",
    ),
    (
        "pcc_per_spot",
        "correlation over genes at each spot, as many papers print it. It is high for any guess of which genes are "
        "high on average, so it says nothing about maps",
    ),
    (
        "null",
        "a guess that sees no image, or a network trained on shuffled targets: what a score is worth is its distance "
        "from these",
    ),
    ("simple rival", "a method without a network, such as a regression on colours: what a network has to beat"),
    ("oracle", "looks at the tested section's own measurements: a yardstick and no method"),
    (
        "novelty",
        "how unlike the training spots a spot looks: above 1 is more than 95 % of held-out spots of the training. A "
        "low value is no promise that the prediction is right",
    ),
)


def answer(study: Study) -> list[str]:
    """Three sentences: how well, better than what, and which genes to trust."""
    return [_how_well(study), _better_than(study), _which_genes(study)]


def _how_well(study: Study) -> str:
    its, name = study.scores, plain(study.model)
    whose = "that also gave sections to the training" if _same_patient(study) else "whose tissue was not trained on"
    interval = its["intervals"]["pcc_per_gene_mean"]
    spread = f" (95 % interval over {its['interval_over']}: {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    share = its["fraction_of_ceiling"]
    ceiling = (
        f", {percent(share)} of the {its['ceiling_mean']:.2f} that counting noise leaves possible"
        if share is not None
        else ""
    )
    return (
        f"In {counted(its['n_sections'], 'section')} ({its['n_spots']:,.0f} spots) of "
        f"{counted(its['n_patients'], 'patient')} {whose}, {name} draws a gene's map with a mean correlation of "
        f"{its['pcc_per_gene_mean']:.2f} to what was measured{spread}{ceiling}."
    )


def _better_than(study: Study) -> str:
    its, name, models = study.scores, plain(study.model), study.result["models"]
    parts = []
    if study.rival is not None:
        rival = models[study.rival]
        parts.append(
            f"{plain(study.rival)} ({plain(rival['description'], 120)}), which needs no network, reaches "
            f"{rival['pcc_per_gene_mean']:.2f}: {_verdict(study, study.rival)}"
        )
    if "train_mean" in models and study.model != "train_mean":
        floor = models["train_mean"]["mse"]
        relation = "less than" if its["mse"] < floor else "no less than"
        parts.append(
            f"the squared error of {name} is {its['mse']:.3f}, {relation} the {floor:.3f} of a constant that never "
            "sees an image"
        )
    if parts:
        return f"{'; '.join(parts)}."
    if study.model == "train_mean":
        return "It is itself the floor: a constant that never sees an image."
    return "Nothing simpler was scored beside it, so no figure here has a floor."


def _verdict(study: Study, rival: str) -> str:
    pairs = study.pairs
    both = pairs[pairs[["model_a", "model_b"]].isin([study.model, rival]).all(axis=1)]
    name = plain(study.model)
    if both.empty:
        return f"{name} was not compared with it"
    row = both.iloc[0]
    order = "better" if row["model_a"] == study.model else "worse"
    if row["verdict"] == DIFFER:
        return f"{name} is {order}, and not by chance"
    if row["verdict"] == NOT_TOLD_APART:
        return f"the two cannot be told apart over {row['units']} {row['over']}"
    return f"{name} is {order} here, but {row['verdict']} were tried to tell that from chance"


def _which_genes(study: Study) -> str:
    counts = study.trust["trust"].value_counts()
    said = ", ".join(f"{counts.get(word, 0)} {word} ({meaning})" for word, meaning in MEANINGS.items())
    limit = "a new patient" if _same_patient(study) else "slides of another laboratory"
    return f"Of {counted(len(study.trust), 'gene')}: {said}; none of this is known for {limit}."


def _same_patient(study: Study) -> bool:
    return bool(study.result["protocol"]["same_patient"])


def models_table(study: Study) -> Table:
    """All models with their nulls, oracles greyed, and the ceiling as the last row."""
    rows = []
    for name, row in study.board.iterrows():
        its = study.result["models"][name]
        interval = its["intervals"]["pcc_per_gene_mean"]
        rows.append(
            [
                f"{name}{' *' if row['kind'] == 'oracle' else ''}",
                f"{row['kind']}: {its['description'].replace('`', '')}" if row["kind"] != "network" else "network",
                number(row["pcc_per_gene"], 3) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""),
                percent(row["fraction_of_ceiling"]),
                *(number(its[key], 4) for key in ("mse", "mse_offset", "mse_pattern")),
                number(row["pcc_per_spot"], 3),
                str(row["against_best"]),
            ]
        )
    oracles = frozenset(place for place, kind in enumerate(study.board["kind"]) if kind == "oracle")
    possible = study.scores["ceiling_mean"]
    if possible is not None:
        rows.append(["ceiling", "what counting noise leaves possible", f"{possible:.3f}", "100 %", *["-"] * 4, ""])
    headers = ["method", "what it is", "pcc_per_gene", "of ceiling", "MSE", "offset", "pattern", "pcc_per_spot"]
    return Table([*headers, "against the best"], rows, oracles | ({len(rows) - 1} if possible is not None else set()))


def folds_table(study: Study) -> Table:
    """Which sections were trained on and which tested, fold by fold."""
    return Table(
        ["fold", "trained on", "chosen on", "tested on"],
        [
            [
                plain(fold["name"]),
                names(fold["train"]),
                names(fold["validation"]) or "left-out spots of the training sections",
                names(fold["test"]),
            ]
            for fold in study.result["folds"]
        ],
    )


def trust_table(trust: pd.DataFrame, second: tuple[str, str] | None = None, most: int | None = None) -> Table:
    """Genes with their words, best predicted first.

    Parameters
    ----------
    trust
        ``gene, trust, pcc_per_gene, pcc_low, pcc_high, of_ceiling, coverage_90``, a row a gene.
    second
        Column of another word, and its title.
    most
        Of more genes than that the first ones and the markers; all where None.
    """
    shown = trust.sort_values("pcc_per_gene", ascending=False, kind="stable")
    if most is not None and len(shown) > most:
        first = shown["gene"].isin(list(shown["gene"][:most]))
        shown = shown[first | shown["gene"].isin(MARKERS)]
    with_coverage = shown["coverage_90"].notna().any()
    rows = [
        [
            str(row["gene"]),
            str(row["trust"]),
            *([str(row[second[0]])] if second else []),
            number(row["pcc_per_gene"], 2),
            f"{number(row['pcc_low'], 2)} to {number(row['pcc_high'], 2)}",
            percent(row["of_ceiling"]),
            *([percent(row["coverage_90"])] if with_coverage else []),
        ]
        for _, row in shown.iterrows()
    ]
    headers = ["gene", "trust", *([second[1]] if second else []), "pcc_per_gene", "range", "of ceiling"]
    return Table([*headers, *(["in 90 % interval"] if with_coverage else [])], rows, marks=MARKS)


def tested_word(study: Study) -> tuple[str, str] | None:
    """The second word of a gene, where the first is the model's own."""
    return ("tested", "by the test") if study.trust["expected"].notna().any() else None


def trust_words(study: Study) -> list[str]:
    """What the words of the genes rest on."""
    rule = f"{RULE[0].upper()}{RULE[1:]}."
    if tested_word(study):
        known = "of a known patient" if _same_patient(study) else "of a patient it was not trained on"
        its = [
            f"The first word is the one the model brought along: what it expected beforehand {known}, from spots of "
            "its training sections that were left out; the most cautious of its trainings counts. The second word, and "
            f"all figures, are what the test then measured. {rule}"
        ]
    else:
        its = [f"The word follows from the test itself. {rule}"]
    its.append("Range: worst and best tested section.")
    coverage = study.trust["coverage_90"].mean()
    if pd.notna(coverage):
        its.append(f"Of all measured values {percent(coverage)} lie within the model's 90 % intervals.")
    return its


def glossary() -> Table:
    return Table(["word", "meaning"], GLOSSARY)


def names(texts: Sequence[str], most: int = 12) -> str:
    """A list in words, cut where it is long."""
    shown = ", ".join(plain(text) for text in texts[:most])
    return f"{shown} and {len(texts) - most} more" if len(texts) > most else shown


def counted(n: float, what: str) -> str:
    """``3 sections``, ``1 section``."""
    return f"{n:,.0f} {what}{'' if n == 1 else 's'}"


def percent(share: float | None) -> str:
    return "-" if share is None or pd.isna(share) else f"{round(100 * share)} %"


def number(value: float | None, decimals: int) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.{decimals}f}"
