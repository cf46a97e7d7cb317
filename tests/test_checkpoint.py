"""A run folder: what is in it, that it is whole or refused, and that no write leaves half a file."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from hifusion import checkpoint
from hifusion.checkpoint import FORMAT, Run, load_tensors, optimiser_tensors, restore_optimiser, save_tensors
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.models.hifusion import HiFusion
from views import GENES, NETWORK, PANEL, RECIPE, TRAIN, fit_small

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run; to be read only."""
    return fit_small(tmp_path_factory.mktemp("complete") / "run").root


@pytest.fixture
def run_folder(complete: Path, tmp_path: Path) -> Path:
    """A complete run to be spoilt."""
    return Path(copytree(complete, tmp_path / "run"))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_complete_run_holds_just_these_files(complete: Path) -> None:
    """In particular no state to resume from, and no part of a file."""
    kept = {"run.json", "panel.json", "log.csv", "weights.safetensors", "novelty.safetensors", "trust.csv"}
    assert {path.name for path in complete.iterdir()} == kept


def test_nothing_in_a_run_folder_is_a_pickle_or_a_zip(complete: Path) -> None:
    for path in complete.iterdir():
        start = path.read_bytes()[:2]
        assert start[:1] != b"\x80" and start != b"PK"


def test_an_opened_run_gives_back_what_was_trained(complete: Path) -> None:
    run = Run.open(complete)
    assert run.recipe == RECIPE
    assert run.panel == PANEL
    assert run.facts["state"] == "complete"
    assert set(run.facts["versions"]) == {"python", "hifusion", "torch", "lightning-fabric", "anndata", "numpy"}
    assert len(run.id) == 12 and int(run.id, 16) >= 0


def test_train_mean_is_the_mean_profile_of_the_training_sections(complete: Path) -> None:
    expected = np.concatenate([view.expression for view in TRAIN]).mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(Run.open(complete).train_mean, expected, rtol=1e-6)


def test_the_network_is_in_evaluation_mode_with_the_stored_weights(complete: Path) -> None:
    network = Run.open(complete).network(CPU)
    assert not any(module.training for module in network.modules())
    stored = load_tensors(complete / "weights.safetensors")[0]
    assert set(stored) == {*network.state_dict(), "train_mean"}
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, stored[name])


def refused(root: Path) -> str:
    """The one line with which opening a run and its network is refused."""
    with pytest.raises(InputError) as caught:
        Run.open(root).network(CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert "is no run folder (no run.json)" in refused(tmp_path)


def test_a_run_that_is_not_finished_is_refused(run_folder: Path) -> None:
    edit_json(run_folder / "run.json", lambda facts: facts.update(state="training"))
    assert "not finished; go on with `hifusion train --resume`" in refused(run_folder)


def test_a_run_of_another_format_is_refused(run_folder: Path) -> None:
    edit_json(run_folder / "run.json", lambda facts: facts.update(format=99))
    assert f"run format 99 is not {FORMAT}" in refused(run_folder)


def test_an_edited_panel_is_refused(run_folder: Path) -> None:
    edit_json(run_folder / "panel.json", lambda panel: panel["genes"].reverse())
    assert "edited after it was written" in refused(run_folder)


def test_a_valid_panel_of_another_run_is_refused(run_folder: Path) -> None:
    other = GenePanel(GENES[::-1], "file")
    other.save(run_folder / "panel.json")
    message = refused(run_folder)
    assert other.digest in message and PANEL.digest in message


@pytest.mark.parametrize("name", ["panel.json", "weights.safetensors"])
def test_a_missing_file_is_named(run_folder: Path, name: str) -> None:
    (run_folder / name).unlink()
    assert f"{name}: no such file" in refused(run_folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 10_000])
def test_weights_cut_short_are_refused(run_folder: Path, kept: int) -> None:
    weights = run_folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "weights.safetensors: cannot be read as weights" in refused(run_folder)


def test_weights_of_another_network_are_refused(run_folder: Path) -> None:
    edit_json(run_folder / "run.json", lambda facts: facts["recipe"]["model"].update(width=16))
    assert "weights do not fit the recipe" in refused(run_folder)


def test_a_recipe_with_an_impossible_value_is_refused(run_folder: Path) -> None:
    edit_json(run_folder / "run.json", lambda facts: facts["recipe"].update(epochs=-1))
    assert "epochs=-1 is not possible" in refused(run_folder)


def test_tensors_come_back_bit_for_bit_with_their_facts(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5)
    tensors = {"a": image, "b": image.contiguous(memory_format=torch.channels_last), "c": torch.tensor(3)}
    tensors |= {"d": torch.tensor([float("nan"), 1.0]).bfloat16(), "e": image[:, :1]}
    save_tensors(tmp_path / "t.safetensors", tensors, {"epoch": "4"})
    read, facts = load_tensors(tmp_path / "t.safetensors")
    assert facts == {"epoch": "4"}
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].nan_to_num(7.0), tensor.nan_to_num(7.0))


class Killed(BaseException):
    """Not an Exception: nothing of ours may catch it."""


def test_a_write_that_is_killed_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.zeros(4)}, {"epoch": "0"})
    before = path.read_bytes()

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("hifusion.files.os.replace", kill)  # all is written, only the last step is missing
    with pytest.raises(Killed):
        save_tensors(path, {"a": torch.ones(4)}, {"epoch": "1"})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_left_by_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    (tmp_path / ".t.safetensors.part").write_bytes(b"half a file")
    save_tensors(path, {"a": torch.ones(4)}, {})
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(4))


def step(network: HiFusion, optimiser: torch.optim.Optimizer, seed: int) -> None:
    region = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    network.eval()  # no dropout
    optimiser.zero_grad()
    network(region.contiguous(memory_format=torch.channels_last)).expression.square().mean().backward()
    optimiser.step()


def test_an_optimiser_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Through a file, and with its state laid out in memory as before, so that no sum is taken in another order."""

    def fresh() -> tuple[HiFusion, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = HiFusion(NETWORK).to(memory_format=torch.channels_last)
        return network, torch.optim.Adam(network.parameters(), lr=1e-3)

    network, optimiser = fresh()
    step(network, optimiser, 0)
    save_tensors(tmp_path / "t.safetensors", {**optimiser_tensors(optimiser), **network.state_dict()}, {})
    other, restored = fresh()
    tensors, _ = load_tensors(tmp_path / "t.safetensors")
    restore_optimiser(restored, tensors)
    other.load_state_dict({name: tensors[name] for name in other.state_dict()})
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert (ours in optimiser.state) == (theirs in restored.state)
        for what, tensor in optimiser.state.get(ours, {}).items():
            assert torch.equal(tensor, restored.state[theirs][what])
            assert tensor.stride() == restored.state[theirs][what].stride()
    step(network, optimiser, 1)
    step(other, restored, 1)
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_versions_name_every_package_that_decides_a_figure() -> None:
    assert checkpoint.versions()["torch"] == torch.__version__
