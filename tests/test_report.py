"""The report: what it says of an evaluation, a benchmark and a run, that names are only text, and how it opens."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from browsing import chromium
from fabricate import lattice_section, refused, write_her2st
from hifusion import api, files, metrics
from hifusion.gene_trust import measured_trust
from hifusion.report_page import report
from hifusion.report_study import open_study
from hifusion.section import predicted_section, read_section, write_section
from scoreboard import result_of

AXE = Path(__file__).with_name("axe.min.js")
EVIL_GENE, EVIL_SECTION = "<img src=x onerror=alert(1)>", "../../x"
GENES = ("ERBB2", "KRT19", "CD74", EVIL_GENE)
N = 24
SMALL = (
    "model.region_px=32", "model.spot_px=16", "model.grids=[1,2]", "model.width=2", "model.heads=2",
    "epochs=2", "batch_size=8", "panel_size=10", "precision=32-true",
)  # fmt: skip


def guess(label: str, truth: np.ndarray) -> np.ndarray:
    """HiFusion half of what was measured for the first two genes; the ridge a tenth with noise; the constant flat."""
    random = np.random.default_rng(1)
    if label.startswith("hifusion"):
        return np.column_stack([0.5 * truth[:, :2], random.normal(0, 0.01, (N, 2))]).astype(np.float32)
    return (0.1 * truth + random.normal(0, 0.1, truth.shape)).astype(np.float32) if label == "ridge" else 0 * truth


def write_study(root: Path, kept: tuple[str, ...] = ("A1", "B1"), sections: tuple[str, ...] = ("A1", "B1")) -> Path:
    """What `hifusion evaluate` leaves, with predictions of the sections that were ``kept``."""
    gene_rows, section_rows = [], []
    for name in sections:
        section = lattice_section({gene: np.ones(N, dtype=int) for gene in GENES}, name if name in kept else "A1")
        truth = np.random.default_rng(len(gene_rows)).normal(size=(N, len(GENES))).astype(np.float32)
        centres = section.obsm["spatial"]
        for label in ("train_mean", "ridge", "hifusion-seed0"):
            values = guess(label, truth)
            if name in kept:
                made = predicted_section(
                    section, values, genes=GENES, normalisation="log_share", panel_digest="d", run=label
                )
                made.layers["measured"] = truth
                write_section(made, root / "predictions" / label / f"{name}.h5ad")
            pitch = centres[1, 0] - centres[0, 0]
            scores = metrics.score_section(values, truth, truth.mean(0), centres, pitch, GENES, np.full(4, 0.8))
            seed = 0 if label.startswith("hifusion") else None
            where = {"model": label.split("-")[0], "seed": seed, "label": label, "fold": name, "section": name}
            where["patient"] = name[0]
            gene_rows.append(scores.genes.assign(**where))
            section_rows.append({**where, **scores.section})
    rows, tested = pd.concat(gene_rows), pd.DataFrame(section_rows)
    files.write_text(root / "metrics.csv", rows.to_csv(index=False))
    files.write_text(root / "sections.csv", tested.to_csv(index=False))
    result = result_of(rows, tested)
    for its in result["models"].values():
        its["description"] = "as described"
    folds = [
        {"name": name, "train": ["Z1"], "validation": [], "test": [name], "panel_rule": "top_mean", "n_genes": 4}
        for name in sections
    ]
    files.write_json(root / "metrics.json", result | {"folds": folds, "versions": {"hifusion": "0.1.0"}})
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page, and what it complained of or asked for beside its own file; ``options`` are of the browser's context."""
    context = browser.new_context(**options)
    page, heard = context.new_page(), []
    page.on("console", lambda said: heard.append(said.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda asked: None if asked.url.startswith("data:") else heard.append(asked.url))
    page.goto(file.as_uri())
    heard.remove(file.as_uri())
    yield page, heard
    context.close()


class Seen(HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[dict[str, str | None]]:
        return [its for tag, its in self.tags if tag == "img"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("report") / "evaluation")


@pytest.fixture(scope="module")
def page(study: Path) -> str:
    return report(study, study.parent / "report.html").read_text()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation as the package itself leaves it, with a network of two epochs."""
    root = tmp_path_factory.mktemp("evaluated")
    api.prepare(write_her2st(root / "raw"), root / "store", recipe="tiny", region_px=32)
    api.evaluate(
        root / "store", root / "out", protocol="first_section", recipe="tiny", overrides=SMALL, with_nulls=False
    )
    return root / "out"


def test_it_answers_in_three_sentences_with_the_null_and_the_ceiling(page):
    text = " ".join(Seen(page).text.split())
    assert "hifusion draws a gene's map with a mean correlation of" in text
    assert "of the 0.80 that counting noise leaves possible" in text
    assert "ridge (as described), which needs no network, reaches" in text
    assert "of a constant that never sees an image" in text
    assert re.search(r"Of 4 genes: 2 green \(the map can be read\), 0 amber \(.*?\), 2 red", text)


def test_models_stand_with_nulls_and_ceiling_in_one_table(page):
    text = Seen(page).text
    table = text[text.index("All methods") : text.index("Which genes to trust")]
    assert all(name in table for name in ("train_mean", "ridge", "hifusion", "ceiling", "0.800"))


def test_every_picture_is_carried_in_the_page_and_told_in_words(page):
    pictures = Seen(page).pictures()
    assert len(pictures) == 4  # maps, scatter, distribution, error
    assert all(str(its["src"]).startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for its in pictures)
    assert all(len(str(its["alt"])) > 20 for its in pictures)


def test_what_is_not_there_is_said(page):
    assert "hifusion left no log of epochs" in page and "hifusion does not tell the novelty" in page


def test_the_policy_allows_the_style_by_its_digest_pictures_of_the_page_and_nothing_else(page):
    seen = Seen(page)
    policy = next(its["content"] for tag, its in seen.tags if tag == "meta" and "http-equiv" in its)
    expected = r"default-src 'none'; style-src 'sha256-\S+'; img-src data:; base-uri 'none'; form-action 'none'"
    assert re.fullmatch(expected, str(policy))
    assert not [tag for tag, _ in seen.tags if tag in ("script", "link", "iframe", "object", "a")]
    assert not [name for _, its in seen.tags for name in its if name.startswith("on") or name in ("style", "href")]


def test_an_evil_gene_is_shown_as_text(page):
    seen = Seen(page)
    assert EVIL_GENE in seen.text
    assert not [its for its in seen.pictures() if its["src"] == "x"]


def test_an_evil_section_is_shown_as_text_and_opens_no_file(tmp_path):
    folder = write_study(tmp_path / "deep" / "evaluation", kept=("A1",), sections=("A1", EVIL_SECTION))
    decoy = tmp_path / "deep" / "evaluation" / "x.h5ad"  # where predictions/hifusion-seed0/../../x.h5ad points to
    decoy.write_text("not for reading")
    before = set(tmp_path.rglob("*"))
    out = report(folder, tmp_path / "report.html", section=EVIL_SECTION)
    assert EVIL_SECTION in Seen(out.read_text()).text
    assert "No predictions of it were kept" in out.read_text()
    assert set(tmp_path.rglob("*")) - before == {out}


def test_words_of_the_test_follow_the_rule(study):
    trust = open_study(study).trust.set_index("gene")
    assert trust["trust"].to_dict() == {"ERBB2": "green", "KRT19": "green", "CD74": "red", EVIL_GENE: "red"}
    assert trust["expected"].isna().all() and trust["coverage_90"].isna().all()


def write_card(run: Path, words: dict[str, str]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    card = pd.DataFrame({"gene": list(words), "trust": list(words.values())})
    card = card.assign(pcc_per_gene=0.6, pcc_low=0.5, pcc_high=0.7, of_ceiling=0.8, coverage_90=0.9)
    card.to_csv(run / "trust.csv", index=False)
    return run


def test_the_most_cautious_card_comes_before_the_word_of_the_test(study, tmp_path):
    rows = pd.read_csv(study / "metrics.csv").query("model == 'hifusion'")
    runs = [write_card(tmp_path / "one", {"ERBB2": "green", "CD74": "amber"})]
    runs.append(write_card(tmp_path / "two", {"ERBB2": "amber", "CD74": "green"}))
    trust = measured_trust(rows, [], runs).set_index("gene")
    assert trust["trust"].to_dict() == {"ERBB2": "amber", "KRT19": "green", "CD74": "amber", EVIL_GENE: "red"}
    assert trust["tested"].to_dict() == {"ERBB2": "green", "KRT19": "green", "CD74": "red", EVIL_GENE: "red"}
    assert trust["coverage_90"].isna().all()  # what a card expects was not measured
    strangers = measured_trust(rows, [], runs, known_patient=False).set_index("gene")["expected"]
    assert strangers[["ERBB2", "CD74"]].tolist() == ["red", "red"]  # the card has tried no new patient


def test_coverage_is_measured_where_predictions_have_intervals(study, tmp_path):
    section = read_section(study / "predictions" / "hifusion-seed0" / "A1.h5ad")
    section.layers["lower_90"] = section.layers["measured"] - 1
    section.layers["upper_90"] = section.layers["measured"] + np.where(np.arange(N) < N // 4, 1, -0.5)[:, None]
    write_section(section, tmp_path / "A1.h5ad")
    rows = pd.read_csv(study / "metrics.csv").query("model == 'hifusion'")
    assert (measured_trust(rows, [tmp_path / "A1.h5ad"])["coverage_90"] == 0.25).all()


def test_the_page_has_both_words_where_the_model_brings_its_own(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "evaluation")
    write_card(folder / "runs" / "A1" / "hifusion-seed0", {"ERBB2": "amber", "KRT19": "green"})
    files.write_json(folder / "runs" / "A1" / "hifusion-seed0" / "run.json", {"best_epoch": 1})
    text = Seen(report(folder, tmp_path / "report.html").read_text()).text
    assert "by the test" in text and "what it expected beforehand of a patient it was not trained on" in text
    assert "Of 4 genes: 0 green" in text  # no new patient was tried, whatever the test then found


def test_it_speaks_of_the_best_network_unless_told_otherwise(study, tmp_path):
    assert open_study(study).model == "hifusion"
    assert open_study(study, model="ridge").model == "ridge"
    assert "How far to trust ridge" in report(study, tmp_path / "ridge.html", model="ridge").read_text()


def test_maps_are_of_genes_that_every_panel_has(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "evaluation")
    rows = pd.read_csv(folder / "metrics.csv")
    rows[(rows["gene"] != "ERBB2") | (rows["section"] != "B1")].to_csv(folder / "metrics.csv", index=False)
    shown = open_study(folder)
    assert shown.genes == ["KRT19", "CD74"] and "ERBB2" in set(shown.trust["gene"])
    with refused("gene 'ERBB2' is not in the panels of all tested sections"):
        open_study(folder, genes=["ERBB2"])


def test_an_evaluation_of_the_package_has_curves_and_novelty(real, tmp_path):
    seen = Seen(report(real, tmp_path / "report.html").read_text())
    told = " ".join(str(its["alt"]) for its in seen.pictures())
    assert "Learning curves of hifusion" in told and "Novelty of the spots" in told
    assert "Nothing simpler was scored beside it" in seen.text


def test_a_run_tells_its_recipe_its_sections_and_that_it_knows_no_score(real, tmp_path):
    (made,) = real.glob("runs/*/hifusion-seed0")
    run = shutil.copytree(made, tmp_path / "run")
    (run / "trust.csv").unlink()  # as runs of earlier versions, and of networks that say nothing of spots left out
    seen = Seen(report(run, tmp_path / "report.html").read_text())
    assert "hifusion learned 10 genes from" in seen.text and "A1" in seen.text
    assert "How well it predicts is not known from the run alone" in seen.text
    assert "brings no trust card" in seen.text
    assert [str(its["alt"])[:15] for its in seen.pictures()] == ["Learning curves"]


def test_a_run_shows_the_card_it_brings(real, tmp_path):
    (run,) = real.glob("runs/*/hifusion-seed0")
    carded = write_card(shutil.copytree(run, tmp_path / "run"), {"ERBB2": "green", EVIL_GENE: "red"})
    text = report(carded, tmp_path / "report.html").read_text()
    assert re.search(r'<td class="good text">green</td>', text) and EVIL_GENE in Seen(text).text
    assert "For patients it was trained on: 1 green (the map can be read), 0 amber" in text
    assert "For a new patient: 0 green, 0 amber, 2 red." in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "stnet"}, "model 'stnet' is not in"),
        ({"genes": ["ERBB22"]}, "gene 'ERBB22' is not in the panels"),
        ({"section": "Q9"}, "section 'Q9' is not in the tested sections"),
        ({"out": "report.pdf"}, "ends in .html"),
        ({"source": "nowhere"}, "is no evaluation, benchmark or run"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_line(study, tmp_path, options, message):
    given: dict[str, Any] = {"source": study, "out": "report.html"} | options
    with refused(message):
        report(tmp_path / given.pop("source"), tmp_path / given.pop("out"), **given)
    assert not list(tmp_path.iterdir())


def test_half_an_evaluation_and_a_stopped_run_are_refused(study, real, tmp_path):
    broken = shutil.copytree(study, tmp_path / "broken")
    (broken / "metrics.json").write_text("[]")
    with refused("is not what `hifusion evaluate` writes"):
        report(broken, tmp_path / "report.html")
    (run,) = real.glob("runs/*/hifusion-seed0")
    stopped = shutil.copytree(run, tmp_path / "run")
    facts = json.loads((stopped / "run.json").read_text())
    files.write_json(stopped / "run.json", facts | {"state": "started"})
    with refused("the run is not finished"):
        report(stopped, tmp_path / "report.html")
    with refused("--section is not for a run"):
        report(run, tmp_path / "report.html", section="A1")


@pytest.mark.parametrize("width, scheme", [(1440, "light"), (390, "dark")])
def test_it_opens_without_scripts_network_or_complaint(browser, page, study, width, scheme):
    how: dict[str, Any] = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    with opened(browser, study.parent / "report.html", java_script_enabled=False, **how) as (shown, heard):
        assert "How far to trust hifusion" in shown.inner_text("h1")
        assert shown.locator("img").count() == 4
        heights = [shown.locator("img").nth(i).bounding_box()["height"] for i in range(4)]
        assert min(heights) > 60  # a picture that cannot be decoded is one line high
        assert shown.locator("body").bounding_box()["width"] <= width  # nothing pushes the page sideways
        assert heard == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, page, study, scheme):
    with opened(browser, study.parent / "report.html", color_scheme=scheme) as (shown, heard):
        shown.evaluate(AXE.read_text())
        found = shown.evaluate("axe.run()")["violations"]
        assert [(its["id"], its["nodes"][0]["html"]) for its in found if its["impact"] in ("serious", "critical")] == []
        assert heard == []
