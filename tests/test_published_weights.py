"""Weights that the authors' code has saved become a run, as they are or learned on from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fabricate import refused
from hifusion import files, recipes
from hifusion.models import MODELS, asign_core, bleep, egn, hifusion, hist2st, histogene, stnet, triplex
from hifusion.models.hifusion import HiFusion
from hifusion.prediction import predict_view
from hifusion.published_weights import published_weights
from hifusion.report_page import report
from test_training import read_log
from views import NETWORK, RECIPE, TRAIN, VALIDATION, fit_small

AS_THEY_ARE = replace(RECIPE, epochs=0)
NAMES: dict[str, Any] = {
    "hifusion": hifusion,
    "stnet": stnet,
    "histogene": histogene,
    "hist2st": hist2st,
    "egn": egn,
    "triplex": triplex,
    "asign2d": asign_core,
    "asign3d": asign_core,
    "bleep": bleep,
}


def published(network: HiFusion) -> dict[str, torch.Tensor]:
    return {name: network.state_dict()[own].clone() for own, name in hifusion.reference_names(network).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("published") / "hifusion.pth"
    torch.save({"state_dict": {f"module.{name}": its for name, its in published(HiFusion(NETWORK)).items()}}, path)
    return path


def test_with_no_epochs_they_are_the_run_with_novelty_and_a_trust_card(checkpoint: Path, tmp_path: Path) -> None:
    run = fit_small(tmp_path / "run", AS_THEY_ARE, weights=checkpoint)
    torch.manual_seed(5)
    network = HiFusion(NETWORK).eval()
    assert VALIDATION[0].regions is not None
    regions = torch.from_numpy(VALIDATION[0].regions).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = network(regions).expression
    np.testing.assert_allclose(predict_view(run, VALIDATION[0]), expected, atol=1e-5)
    assert run.facts["best_epoch"] is None and "B1; published weights, validation MSE" in repr(run)
    assert run.novelty is not None and run.trust() is not None
    (row,) = read_log(tmp_path / "run")
    assert row["epoch"] == "-1" and float(row["validation_mse"]) == pytest.approx(run.facts["validation_mse"])


def test_a_report_says_what_was_learned_and_what_was_given(checkpoint: Path, tmp_path: Path) -> None:
    digest = files.digest_file(checkpoint)[:16]
    for name, recipe, words in (
        ("as", AS_THEY_ARE, ["has published weights for 3 genes", "it was not trained further", "no log of epochs"]),
        ("on", RECIPE, ["learned 3 genes", "Training began with published weights", "at most 3 epochs"]),
    ):
        run = fit_small(tmp_path / name, recipe, weights=checkpoint)
        page = report(run.root, tmp_path / f"{name}.html").read_text()
        for word in (*words, digest):
            assert word in page, word


def test_learning_begins_with_them_and_keeps_them_where_no_epoch_is_better(checkpoint: Path, tmp_path: Path) -> None:
    run, other = fit_small(tmp_path / "run", weights=checkpoint), fit_small(tmp_path / "other")
    assert [row["epoch"] for row in read_log(tmp_path / "run")] == ["-1", "0", "1", "2"]
    assert not np.array_equal(predict_view(run, TRAIN[0]), predict_view(other, TRAIN[0]))
    worse = fit_small(tmp_path / "worse", replace(RECIPE, lr=3.0), weights=checkpoint)
    as_they_are = fit_small(tmp_path / "as", AS_THEY_ARE, weights=checkpoint)
    assert worse.facts["best_epoch"] is None
    np.testing.assert_array_equal(predict_view(worse, TRAIN[0]), predict_view(as_they_are, TRAIN[0]))


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(checkpoint: Path, tmp_path: Path) -> None:
    whole = fit_small(tmp_path / "whole", weights=checkpoint)

    def stop(what: str, done: int, total: int) -> None:
        if "2" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_small(tmp_path / "run", weights=checkpoint, progress=stop)
    with refused("differs in weights"):
        fit_small(tmp_path / "run", resume=True)
    run = fit_small(tmp_path / "run", weights=checkpoint, resume=True)
    assert (run.root / "weights.safetensors").read_bytes() == (whole.root / "weights.safetensors").read_bytes()
    assert len(read_log(run.root)) == 4


@pytest.mark.parametrize("network", NAMES)
def test_every_network_takes_its_own(network: str, tmp_path: Path) -> None:
    if network == "stnet":
        pytest.importorskip("monai")
    config = recipes.recipe_for(network, "tiny").sized(7).model
    torch.manual_seed(0)
    module: Any = MODELS[network].module(config)
    state = (module.network if network == "stnet" else module).state_dict()
    names = NAMES[network].reference_names(module)
    given = {name: state[own].contiguous().clone() for own, name in names.items() if not own.startswith("pixel_")}
    if network == "egn":  # one position more, which nothing reads
        given["pos_embedding"] = torch.nn.functional.pad(given["pos_embedding"], (0, 0, 0, 1))
    safetensors.torch.save_file(given, tmp_path / "weights.safetensors")
    found = published_weights(tmp_path / "weights.safetensors", network, config)
    torch.testing.assert_close(found, dict(module.state_dict()), rtol=0, atol=0)


class Trap:
    """What a pickle may run when it is opened carelessly."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trapped"),))


def test_what_does_not_fit_or_is_no_weights_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "trap.pth")
    torch.save([1, 2], "list.pth")
    Path("cut.pth").write_bytes(checkpoint.read_bytes()[:2000])
    torch.save(published(HiFusion(replace(NETWORK, n_genes=2))), "genes.pth")
    torch.save({name: its for name, its in published(HiFusion(NETWORK)).items() if "fusion" not in name}, "part.pth")
    for file, words in {
        "trap.pth": "torch.save(model.state_dict(), FILE)",
        "list.pth": "holds a list",
        "cut.pth": "is damaged",
        "genes.pth": "n_genes is 2, the recipe's 3; give the panel it was trained on",
        "part.pth": "missing: ",
        "gone.pth": "no such file",
    }.items():
        with refused(file, words):
            fit_small(tmp_path / "run", AS_THEY_ARE, weights=Path(file))
        assert not (tmp_path / "run").exists()
    assert not Path("trapped").exists()
    with refused("width is 8, the recipe's 16; give --set model.width"):
        fit_small(tmp_path / "wide", replace(AS_THEY_ARE, model=replace(NETWORK, width=16)), weights=checkpoint)
    with refused("epochs=0", "--weights"):
        fit_small(tmp_path / "nothing", AS_THEY_ARE)
