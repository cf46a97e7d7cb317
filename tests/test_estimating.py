"""What is said of a training before it begins, against what it then takes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fabricate import contents, refused
from hifusion import api, estimating, probing, recipes
from hifusion.cohort import Cohort
from hifusion.models import MODELS
from hifusion.recipes import NETWORKS
from hifusion.training import chosen, split
from test_cli import run

FACTOR = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sections of the synthetic cohort with the patches of `tiny`."""
    root = tmp_path_factory.mktemp("estimating")
    api.synthesise(root / "raw", patients=3, sections_per_patient=1)
    api.prepare(root / "raw", root / "store", recipe="tiny")
    return root / "store"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second of steps instead of ten."""
    monkeypatch.setattr(estimating.training_costs, "__kwdefaults__", {**KEYWORDS["training"], "budget_s": 1.0})
    monkeypatch.setattr(estimating.evaluation_costs, "__kwdefaults__", {"budget_s": 1.0})


KEYWORDS: dict[str, Any] = {"training": estimating.training_costs.__kwdefaults__}


def within(factor: float, said: float, truth: float) -> bool:
    return truth / factor <= said <= truth * factor


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_time_and_disk_of_a_training_are_those_told_before_and_nothing_is_written(store: Path, tmp_path: Path) -> None:
    """Time within a factor of 3; the run folder, without its log and JSON, within 5 %."""
    before = contents(store)
    said = api.train_costs(store, recipe="tiny", overrides=["epochs=5"], validation=["C1"])
    assert contents(store) == before
    state = tmp_path / "run" / "last.safetensors"
    sizes = {0.0}
    started = time.perf_counter()
    trained = api.train(
        store,
        tmp_path / "run",
        recipe="tiny",
        overrides=["epochs=5"],
        validation=["C1"],
        progress=lambda *_: sizes.add(state.stat().st_size / 2**20) if state.exists() else None,
    )
    took = time.perf_counter() - started
    assert within(FACTOR, said["seconds"], took), (said, took)
    assert within(FACTOR, said["seconds_per_epoch"], trained.facts["train_seconds"] / 5)
    tensors = sum(path.stat().st_size for path in trained.root.glob("*.safetensors")) / 2**20
    assert said["disk_mib"] == pytest.approx(tensors, rel=0.05)
    kept = (trained.root / "weights.safetensors").stat().st_size / 2**20
    assert said["disk_while_training_mib"] == pytest.approx(kept + 2 * max(sizes), rel=0.05)
    assert (said["train_spots"], said["epochs"], said["recomputed"]) == (trained.facts["train_spots"], 5, False)
    assert said["memory_mib"] > 100  # Python with torch alone


@pytest.mark.usefixtures("short")
def test_the_command_line_tells_both_and_needs_no_place_for_a_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(store)
    words: list[Any] = ["train", store, "--recipe", "tiny", "--sections", "A1", "--dry-run"]
    assert run(*words, "--json", monkeypatch=monkeypatch) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["seconds"] > 0 and said["network"] == "hifusion" and said["device"] == "cpu"
    assert run(*words, "--devices", "2", monkeypatch=monkeypatch) == 2
    assert "--dry-run tries one device" in capsys.readouterr().err
    words = ["evaluate", "--data", store, "--protocol", "leave_one_patient_out", "--recipe", "tiny"]
    assert run(*words, "--seeds", "0,1", "--dry-run", "--json", monkeypatch=monkeypatch) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["trainings"] == 3 * (2 + 1)  # the shuffled null is trained with one seed
    assert said["seconds"] == pytest.approx(sum(said["seconds_by_model"].values()), rel=0.02)
    assert {"train_mean", "ridge"} <= set(said["not_counted"])
    assert run(*words[:-2], "--recipe", "tiny", "--dry-run", monkeypatch=monkeypatch) == 0
    assert "seconds_by_model" in capsys.readouterr().out
    assert contents(store) == before and not list(tmp_path.iterdir())
    assert run("train", store, "--recipe", "tiny", monkeypatch=monkeypatch) == 2
    assert "give one with -o" in capsys.readouterr().err


def test_what_a_training_would_refuse_is_refused_before(store: Path) -> None:
    with refused("no region patches for Z9"):
        api.train_costs(store, recipe="tiny", sections=["Z9"])
    with refused("the recipe takes region_px=448"):
        api.train_costs(store, recipe="her2st_2d")


@pytest.mark.parametrize("network", sorted({*NETWORKS} - {"stnet"}))
def test_every_network_can_be_probed(store: Path, network: str) -> None:
    """Frozen features are made up, so that no encoder is asked. A section that a network takes whole counts whole."""
    cohort, recipe = Cohort.open(store), recipes.recipe_for(network, "tiny")
    panel, train, _ = chosen(cohort, recipe, ["A1"], ())
    recipe = recipe.sized(len(panel.genes))
    trained, held_out = split(recipe, train, [], 0)
    whole = MODELS[recipe.network].module.whole_section  # type: ignore[attr-defined]
    spots = len(train[0].centres_px)
    assert probing._seen(recipe, trained) == (spots if whole else len(trained[0][1]))
    found = probing.probe(recipe, trained, held_out, budget_s=0.0)
    assert found.train_s > 0 and found.predict_s > 0
    assert found.training_mib > found.run_mib > 0
