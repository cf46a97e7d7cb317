"""The training loop: seeds, selection, resuming, and what it refuses."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hifusion import files, training
from hifusion.checkpoint import Run, load_tensors, save_tensors
from hifusion.data import read_regions
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.inference import predict_regions
from hifusion.models.hifusion import HiFusionConfig
from hifusion.optimisers import learning_rate
from hifusion.training import shuffled
from views import GENES, PANEL, RECIPE, TRAIN, VALIDATION, fit_small, make_store, make_view


class Stopped(BaseException):
    """A kill: not an Exception, so nothing of ours may catch it."""


def stop_at(step: int) -> Callable[[str, int, int], None]:
    """A progress callback that stops the training at its ``step``-th call."""
    calls = iter(range(1, 10_000))

    def progress(*_: object) -> None:
        if next(calls) == step:
            raise Stopped

    return progress


def read_log(root: Path) -> list[dict[str, str]]:
    """``log.csv`` without the columns that tell how fast the machine was."""
    with (root / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: text for key, text in row.items() if key not in ("seconds", "spots_per_s")} for row in rows]


def read_facts(root: Path) -> dict[str, Any]:
    """``run.json`` without how long it took."""
    return {name: value for name, value in files.read_json(root / "run.json").items() if name != "train_seconds"}


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("weights.safetensors", "panel.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert read_facts(a) == read_facts(b)
    assert read_log(a) == read_log(b)
    assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never stopped; to be read only."""
    return fit_small(tmp_path_factory.mktemp("whole") / "run").root


STEPS = 5  # batches an epoch: 35 spots, 8 a batch


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2, 2 * STEPS + 1, 3 * STEPS])
def test_a_stopped_and_resumed_run_is_the_same_bit_for_bit(whole: Path, tmp_path: Path, step: int) -> None:
    """Stopped in the middle of an epoch, in its last step, and before any epoch was finished."""
    with pytest.raises(Stopped):
        fit_small(tmp_path / "run", progress=stop_at(step))
    with pytest.raises(InputError, match="not finished"):
        Run.open(tmp_path / "run")
    fit_small(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


BF16 = replace(
    RECIPE,
    precision="bf16-mixed",
    batches="section",
    epochs=2,
    model=HiFusionConfig(n_genes=3, grids=(1, 2), spot_px=64, region_px=64, width=8, heads=4, spot_encoder="resnet10"),
)


def test_resuming_is_exact_in_bfloat16_by_section_with_held_out_blocks_too(tmp_path: Path) -> None:
    given: dict[str, Any] = {"train": [make_view("A1", 20, region_px=64), make_view("B1", 15, region_px=64)]}
    given |= {"validation": [], "seed": 7}
    fit_small(tmp_path / "whole", BF16, **given)
    with pytest.raises(Stopped):
        fit_small(tmp_path / "run", BF16, progress=stop_at(6), **given)
    fit_small(tmp_path / "run", BF16, resume=True, **given)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert len(read_log(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_run_killed_at_any_write_resumes_to_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panel and facts, then weights, log and state of each epoch, then the facts: killed before each rename."""
    recipe = replace(RECIPE, epochs=2)
    whole = fit_small(tmp_path / "whole", recipe).root
    replace_file = files.os.replace
    kills = 0
    for write in range(1, 30):
        left = iter(range(1, 30))

        def kill(source: Path, target: Path, left: Any = left, write: int = write) -> None:
            if next(left) == write:
                raise Stopped
            replace_file(source, target)

        out = tmp_path / str(write)
        with monkeypatch.context() as patch:
            patch.setattr("hifusion.files.os.replace", kill)
            try:
                fit_small(out, recipe)
                break
            except Stopped:
                kills += 1
        fit_small(out, recipe, resume=True)
        assert_same_run(out, whole)
    assert kills >= 2 + 2 * 2 + 1 + 1  # two starting files, log and state of each epoch, weights once at least, the end


def test_a_run_killed_after_its_last_write_is_complete_and_tidied(whole: Path, tmp_path: Path) -> None:
    out = fit_small(tmp_path / "run").root
    save_tensors(out / "last.safetensors", {"left": torch.zeros(1)}, {})
    fit_small(out, resume=True)
    assert_same_run(out, whole)


def test_a_complete_run_resumed_returns_at_once(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    run = fit_small(whole, resume=True, progress=stop_at(1))
    assert run.root == whole
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_state_left_without_a_run_is_not_taken_up(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit_small(tmp_path / "run", seed=1, progress=stop_at(STEPS + 1))
    (tmp_path / "run" / "run.json").unlink()
    fit_small(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_seed_decides_the_weights(whole: Path, tmp_path: Path) -> None:
    assert_same_run(fit_small(tmp_path / "again").root, whole)
    ours = load_tensors(whole / "weights.safetensors")[0]
    theirs = load_tensors(fit_small(tmp_path / "other", seed=1).root / "weights.safetensors")[0]
    assert not torch.equal(ours["head.weight"], theirs["head.weight"])
    assert not torch.equal(ours["spot_encoder.conv1.weight"], theirs["spot_encoder.conv1.weight"])


def mse_of(run: Run, view: Any) -> float:
    regions = [read_regions(view, np.arange(len(view.expression)))]
    predicted = predict_regions(run.network(torch.device("cpu")), regions, precision="32-true")
    return float(np.mean((predicted - view.expression) ** 2))


def test_the_kept_weights_are_those_of_the_lowest_validation_mse_in_the_log(whole: Path) -> None:
    run, log = Run.open(whole), read_log(whole)
    errors = [float(row["validation_mse"]) for row in log]
    assert run.facts["best_epoch"] == int(np.argmin(errors))
    assert run.facts["validation_mse"] == min(errors)
    assert mse_of(run, VALIDATION[0]) == pytest.approx(min(errors), rel=1e-5)
    assert len(set(errors)) == len(errors) == RECIPE.epochs


@pytest.mark.parametrize(
    "selection, errors, kept",
    [
        ("validation", [3.0, 1.0, 2.0], 1),
        ("validation", [1.0, 2.0, 3.0], 0),
        ("validation", [2.0, 1.0, 1.0], 1),  # of equals the first
        ("validation", [3.0, 2.0, 1.0], 2),
        ("last", [1.0, 2.0, 3.0], 2),
    ],
)
def test_selection_keeps_the_epoch_it_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selection: Any, errors: list[float], kept: int
) -> None:
    given = iter(errors)
    monkeypatch.setattr(training, "validation_mse", lambda *_: next(given))
    run = fit_small(tmp_path / "run", replace(RECIPE, selection=selection))
    assert run.facts["best_epoch"] == kept
    assert run.facts["validation_mse"] == errors[kept]
    assert load_tensors(run.root / "weights.safetensors")[1] == {"epoch": str(kept)}


def test_the_log_tells_each_epoch(whole: Path) -> None:
    log = read_log(whole)
    assert [int(row["epoch"]) for row in log] == list(range(RECIPE.epochs))
    assert [float(row["lr"]) for row in log] == [learning_rate(RECIPE, epoch) for epoch in range(RECIPE.epochs)]
    for row in log:
        terms = [float(row[name]) for name in ("final", "levels", "align")]
        assert float(row["total"]) == pytest.approx(sum(terms), rel=1e-6)


def rates(**changes: Any) -> list[float]:
    """The rate at the start of each of 50 epochs, and after them."""
    recipe = replace(RECIPE, lr=1e-3, min_lr=1e-6, epochs=50, **changes)
    return [learning_rate(recipe, epoch) for epoch in range(51)]


def test_the_rate_falls_by_half_a_cosine() -> None:
    found = rates()
    assert found[0] == 1e-3
    assert found[25] == pytest.approx((1e-3 + 1e-6) / 2)
    assert found[50] == pytest.approx(1e-6)
    assert all(later < earlier for earlier, later in pairwise(found))
    assert learning_rate(RECIPE, 1.9) == learning_rate(RECIPE, 1)


def test_other_rates_by_hand() -> None:
    assert set(rates(schedule="constant")) == {1e-3}
    assert rates(schedule="step")[49:] == pytest.approx([1e-3, 0.9e-3])
    falling = rates(schedule="polynomial")
    assert falling[25] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.5**0.9) and falling[50] == 1e-6
    assert set(rates(schedule="warm_restarts")) == {1e-3}  # each epoch begins with a restart
    restarts = replace(RECIPE, lr=1e-3, schedule="warm_restarts")
    assert learning_rate(restarts, 3.25) == pytest.approx(0.6e-3)
    assert learning_rate(restarts, 3.4999) == pytest.approx(0.2e-3, rel=1e-3)


def test_training_lowers_the_loss_on_what_it_sees(tmp_path: Path) -> None:
    """Regions of two colours whose expression is 1 and -1."""
    view = make_view("A1", 24)
    high = np.arange(24) % 2 == 0
    assert view.regions is not None
    view.regions[high, :16] //= 4
    expression = np.where(high, 1.0, -1.0)[:, None].repeat(3, axis=1).astype(np.float32)
    view = replace(view, expression=expression)
    log = read_log(fit_small(tmp_path / "run", replace(RECIPE, epochs=8, augment=False), train=[view]).root)
    assert float(log[-1]["final"]) < 0.5 < float(log[0]["final"])


def test_progress_tells_spots_done_of_all(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    fit_small(tmp_path / "run", progress=lambda *what: told.append(what))
    assert len(told) == STEPS * RECIPE.epochs
    assert [total for _, _, total in told] == [35 * RECIPE.epochs] * len(told)
    done = [spots for _, spots, _ in told]
    assert done == sorted(done) and done[-1] == 35 * RECIPE.epochs
    assert told[0][0].startswith("epoch 1/3 loss ")


def refused(out: Path, *given: Any, **changes: Any) -> str:
    """The one line with which a training is refused."""
    with pytest.raises(InputError) as caught:
        fit_small(out, *given, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_holds_a_run_is_refused_without_resume(whole: Path) -> None:
    before = (whole / "run.json").read_bytes()
    assert "holds a run already; go on with --resume, or give another folder" in refused(whole)
    assert (whole / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    "recipe, changes, named",
    [
        (RECIPE, {"seed": 1}, "seed (0 there, 1 given)"),
        (replace(RECIPE, lr=1e-3), {}, "recipe.lr (0.005 there, 0.001 given)"),
        (
            replace(RECIPE, epochs=9, model=replace(RECIPE.model, dropout=0.5)),
            {},
            "recipe.epochs (3 there, 9 given), recipe.model.dropout (0.1 there, 0.5 given);",
        ),
        (RECIPE, {"panel": GenePanel(GENES[::-1], "file")}, f"panel_digest ({PANEL.digest} there"),
        (RECIPE, {"train": TRAIN[:1]}, "train (['A1', 'B1'] there, ['A1'] given)"),
        (RECIPE, {"validation": []}, "validation (['C1'] there, [] given)"),
        (RECIPE, {"shuffle_targets": True}, "shuffled (False there, True given)"),
    ],
)
def test_resuming_another_run_is_refused_and_says_what_differs(
    whole: Path, recipe: Any, changes: dict[str, Any], named: str
) -> None:
    message = refused(whole, recipe, resume=True, **changes)
    assert "the run there differs in " in message and named in message


def test_a_diverging_loss_is_one_line_and_leaves_no_complete_run(tmp_path: Path) -> None:
    message = refused(tmp_path / "run", replace(RECIPE, lr=1e6))
    assert "training diverged" in message and "--set lr=3e+05" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "training"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_a_diverged_validation_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(training, "validation_mse", lambda *_: value)
    assert "the validation MSE is" in refused(tmp_path / "run")


def test_a_store_of_other_patches_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    message = refused(tmp_path / "run", store=make_store(16))
    assert "holds patches of region_px=16, mpp=native, the recipe takes region_px=32, mpp=native" in message
    assert "run `hifusion prepare DATA NEW_STORE --recipe tiny --region-px 32`" in message
    message = refused(tmp_path / "run", replace(RECIPE, region_mpp=0.5), store=make_store(32))
    assert "region_px=32 --mpp 0.5`" in message.replace("--region-px ", "region_px=")
    assert "training needs region patches" in refused(tmp_path / "run", store=None)
    assert "holds patches of region_px=33" in refused(tmp_path / "run", store=make_store(33))  # no middle of 32
    assert not (tmp_path / "run").exists()
    training.check_patches(RECIPE, make_store(64))  # larger ones hold smaller ones in their middle


def test_a_section_too_small_to_be_split_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    small = make_view("A1", 3)
    assert "cannot be split; give a validation section" in refused(tmp_path / "run", train=[small], validation=[])
    assert not (tmp_path / "run").exists()


def test_without_validation_sections_blocks_of_each_are_held_out(tmp_path: Path) -> None:
    facts = fit_small(tmp_path / "run", replace(RECIPE, epochs=1), validation=[]).facts
    assert facts["validation"] == []
    assert facts["train_spots"] + facts["validation_spots"] == 35
    assert facts["validation_spots"] > 0


def test_shuffling_deals_the_profiles_of_each_section_out_anew() -> None:
    dealt = shuffled(TRAIN, seed=3)
    for before, after, again in zip(TRAIN, dealt, shuffled(TRAIN, seed=3), strict=True):
        assert not np.array_equal(before.expression, after.expression)
        assert sorted(map(tuple, before.expression)) == sorted(map(tuple, after.expression))
        assert np.array_equal(after.expression, again.expression)
        assert after.regions is before.regions


def test_a_shuffled_run_says_so_and_is_another(whole: Path, tmp_path: Path) -> None:
    run = fit_small(tmp_path / "run", shuffle_targets=True)
    assert run.facts["shuffled"] is True and Run.open(whole).facts["shuffled"] is False
    assert read_log(run.root) != read_log(whole)
    np.testing.assert_allclose(run.train_mean, Run.open(whole).train_mean, rtol=1e-5)
