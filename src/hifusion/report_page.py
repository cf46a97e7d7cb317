"""A report for a biologist as one page: of an evaluation, a benchmark or a run; no network, no script."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hifusion import files
from hifusion import report_pictures as pictures
from hifusion.errors import InputError, plain
from hifusion.expression import GenePanel
from hifusion.pages import Part, Table, chapters, document, template_text
from hifusion.report_methods import evaluation_methods, references, run_methods
from hifusion.report_study import Study, open_study
from hifusion.report_words import (
    MOST_ROWS,
    answer,
    counted,
    folds_table,
    glossary,
    models_table,
    names,
    tested_word,
    trust_table,
    trust_words,
)
from hifusion.reporting import cautions, unmarked
from hifusion.trust_card import MEANINGS, read_card

NO_CURVE = "no log of epochs: it was fitted at once or not at all, or its log.csv is gone."
_RUN_FACTS = (
    "recipe",
    "train",
    "validation",
    "train_spots",
    "train_seconds",
    "best_epoch",
    "validation_mse",
    "versions",
)


def report(
    source: Path,
    out: Path,
    *,
    model: str | None = None,
    genes: Sequence[str] | None = None,
    section: str | None = None,
) -> Path:
    """Write a report as one HTML file that needs no network and no script; returns ``out``.

    Parameters
    ----------
    source
        Folder of ``hifusion evaluate``, ``benchmark`` or ``train``.
    out
        A .html file.
    model, genes, section
        For an evaluation or benchmark: which model the report speaks of, and which maps it shows. Defaults in
        :func:`hifusion.report_study.open_study`.

    Raises
    ------
    InputError
        A folder of none of these, one that is not complete, or a model, gene or section that is not there.
    """
    source, out = Path(source), Path(out)
    if out.suffix.lower() != ".html" or out.is_dir():
        raise InputError(f"{out}: is no place for a report; give a file that ends in .html")
    if (source / "metrics.json").is_file():
        study = open_study(source, model, genes, section)
        title, parts = f"Report: {plain(study.model)}", evaluation_parts(study)
    elif (source / "run.json").is_file():
        given = {"model": model, "genes": genes, "section": section}
        needless = [name for name, value in given.items() if value]
        if needless:
            raise InputError(f"--{needless[0]} is not for a run, which predicts nothing by itself; leave it out")
        title, parts = f"Report: run {plain(source.resolve().name)}", run_parts(source)
    else:
        raise InputError(
            f"{source}: is no evaluation, benchmark or run that is complete; give a folder that `hifusion evaluate`, "
            "`hifusion benchmark` or `hifusion train` left"
        )
    files.write_text(out, document(title, chapters(parts), style=template_text("report.css"), images="data:"))
    return out


def evaluation_parts(study: Study) -> list[Part]:
    """The chapters of a report on an evaluation or benchmark."""
    result, its = study.result, study.scores
    missing = "No predictions of it were kept in the folder, or its panels share no gene, so nothing can be drawn."
    drawn, scattered = pictures.maps(study), pictures.scatter(study)
    learned, novel = pictures.learning_of(study), pictures.novelty(study)
    told = cautions(result)
    grave = [text for text in told if text.startswith("**")]  # the others say what is not there
    return [
        Part(f"How far to trust {plain(study.model)}", list(map(unmarked, grave)), answer(study)),
        Part(
            "What was trained on what",
            paragraphs=[
                f"Protocol {plain(result['protocol']['name'])}: {plain(result['protocol']['meaning'], 200)}. "
                f"{counted(its['n_genes'], 'gene')}, {counted(its['n_spots'], 'spot')} tested once."
            ],
            table=folds_table(study),
        ),
        Part(
            "All methods, with their nulls and the ceiling",
            paragraphs=[
                "Sorted by pcc_per_gene; in brackets a 95 % interval. * oracle: looks at the answer, a yardstick and "
                "no method. The last column tells whether a method differs from the first beyond chance.",
                *(unmarked(text) for text in told if text not in grave),
            ],
            table=models_table(study),
        ),
        Part(
            "Which genes to trust",
            paragraphs=trust_words(study),
            table=trust_table(study.trust, tested_word(study), MOST_ROWS),
            folded=trust_table(study.trust, tested_word(study)) if len(study.trust) > MOST_ROWS else None,
        ),
        Part("Measured and predicted maps", paragraphs=[] if drawn else [missing], pictures=drawn),
        Part("Spot by spot", paragraphs=[] if scattered else [missing], pictures=scattered),
        Part("All genes, method by method", pictures=[pictures.skill(study)]),
        Part("What kind of error", pictures=[pictures.error_split(study)]),
        Part(
            "Where the tissue is new to the model",
            paragraphs=[] if novel else [f"{plain(study.model)} does not tell the novelty of its spots."],
            pictures=novel,
        ),
        Part(
            "Learning curves",
            paragraphs=[] if learned else [f"{plain(study.model)} left {NO_CURVE}"],
            pictures=learned,
        ),
        Part("Methods, for a paper", paragraphs=evaluation_methods(result)),
        Part("To be cited", items=references(result["models"])),
        Part("Words", table=glossary()),
    ]


def run_parts(run: Path) -> list[Part]:
    """The chapters of a report on a run alone."""
    facts, panel = files.read_json(run / "run.json"), GenePanel.load(run / "panel.json")
    if not isinstance(facts, dict) or facts.get("state") != "complete":
        raise InputError(f"{run}: the run is not finished; go on with `hifusion train --resume`")
    lacking = [name for name in _RUN_FACTS if name not in facts]
    if lacking:
        raise InputError(f"{run}/run.json: lacks {', '.join(lacking)}; train the run anew with this version")
    recipe = facts["recipe"]
    learned = [pictures.learning([run], "the run")] if (run / "log.csv").exists() and recipe["epochs"] else []
    how = "learned {} from" if recipe["epochs"] else "has published weights for {}; novelty and trust were measured on"
    return [
        Part(
            f"A trained model: {plain(run.resolve().name)}",
            paragraphs=[
                f"{plain(recipe['network'])} {how.format(counted(len(panel.genes), 'gene'))} "
                f"{counted(facts['train_spots'], 'spot')} of {counted(len(facts['train']), 'section')}: "
                f"{names(facts['train'])}.",
                "How well it predicts is not known from the run alone. Scores against the nulls, the ceiling and maps "
                "need measured sections that were not trained on: hifusion evaluate gives them, and hifusion report "
                "then shows them.",
            ],
            table=_facts_table(facts),
        ),
        _card_part(run),
        Part("Learning curves", paragraphs=[] if learned else [f"The run has {NO_CURVE}"], pictures=learned),
        Part("Gene panel", paragraphs=[", ".join(panel.genes)]),
        Part("Methods, for a paper", paragraphs=run_methods(facts, len(panel.genes))),
        Part("To be cited", items=references([recipe["network"]])),
    ]


def _card_part(run: Path) -> Part:
    """What a run expects of each gene, for patients it knows and for others."""
    title, card, new = "Which genes to trust", read_card(run), read_card(run, known_patient=False)
    if card is None or new is None:
        return Part(title, paragraphs=["This run brings no trust card: of none of its genes is the skill known."])
    said = ", ".join(f"{(card['trust'] == word).sum()} {word} ({meaning})" for word, meaning in MEANINGS.items())
    strange = ", ".join(f"{(new['trust'] == word).sum()} {word}" for word in MEANINGS)
    table, second = card.assign(new=new["trust"]).reset_index(), ("new", "new patient")
    return Part(
        title,
        paragraphs=[
            f"For patients it was trained on: {said}. For a new patient: {strange}.",
            "That is what the run expects, from spots of its training sections that were left out. Red for a new "
            "patient may also mean that it was never tried. Range: 90 % interval.",
        ],
        table=trust_table(table, second, MOST_ROWS),
        folded=trust_table(table, second) if len(table) > MOST_ROWS else None,
    )


def _epoch_rows(facts: dict[str, Any]) -> dict[str, str]:
    return {
        "epoch chosen on": names(facts["validation"]) or "left-out spots of the training sections",
        "epoch kept": f"{facts['best_epoch']}, counted from 0, of {facts['recipe']['epochs']}",
    }


def _facts_table(facts: dict[str, Any]) -> Table:
    recipe, spots = facts["recipe"], facts.get("spots", {})
    rows = {
        "recipe": f"{recipe['name']} (values: {recipe['source']})",
        "trained on": names(facts["train"]),
        **({"weights to begin with": f"published, {facts['weights']}"} if facts.get("weights") else {}),
        **({} if facts["best_epoch"] is None else _epoch_rows(facts)),
        "MSE on left-out spots": f"{facts['validation_mse']:.4f}",
        "expression": str(recipe["normalisation"]),
        "spot": f"{spots['spot_diameter_um']:g} µm, {spots['pitch_um']:g} µm apart" if spots else "not told",
        "seed": str(facts["seed"]),
        "training time": f"{facts['train_seconds']:,.0f} s on {facts.get('device', 'a device not told')}",
    }
    if facts.get("shuffled"):
        rows["shuffled"] = "yes: a null, trained on targets dealt out anew"
    return Table(["fact", "value"], [[name, plain(value, 200)] for name, value in rows.items()])
