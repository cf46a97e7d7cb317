"""Several processes train one network: the same batches, the same steps, one run folder."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fabricate import refused, write_her2st
from hifusion import api, devices, files, recipes
from hifusion.checkpoint import Run, load_tensors
from hifusion.models.hifusion import HiFusion
from hifusion.models.steps import hifusion_step
from hifusion.ranks import Launched, Share, asked, is_first, launched
from hifusion.surroundings import Surroundings
from hifusion.training import fit
from test_evaluation import SMALL
from test_training import read_log
from train_together import recipe_for, without_statistics
from views import PANEL, RECIPE, TRAIN, fit_small, make_store

WORKER = Path(__file__).with_name("train_together.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "--max-restarts", "0"]
PATIENCE_S = 120


def together(out: Path, ranks: int = 2, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Train in processes started by torchrun, or in one without it."""
    start = TORCHRUN if ranks > 1 else [sys.executable]
    words = [*start, str(WORKER), str(out), json.dumps({**settings, "ranks": ranks})]
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_tensors(root / "weights.safetensors")[0]


def losses(root: Path) -> np.ndarray:
    return np.array([[float(row[name]) for name in ("total", "validation_mse")] for row in read_log(root)])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("spots", [2, 3, 7, 8, 33])
def test_every_spot_of_a_batch_counts_once(ranks: int, spots: int) -> None:
    """Each row weighs 1 / spots, over all ranks; no rank is left with nothing to do, or with one spot alone."""
    counted = np.zeros(spots)
    for rank in range(ranks):
        share = Share(rank, ranks)
        own = np.arange(spots)[share.rows(spots)]
        counted[own] += share.weight(spots) / len(own)
        assert len(own) >= 2
    np.testing.assert_allclose(counted, 1 / spots)


def test_what_torchrun_or_srun_has_started_is_seen() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}
    srun = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "0"}
    assert launched(torchrun) == Launched("torchrun", 4, 2) and not is_first(torchrun)
    assert launched(srun) == Launched("srun", 4, 2) and is_first(srun)
    assert launched({"SLURM_NTASKS": "8"}) is None  # a job of many tasks, a command without srun
    assert launched({}) is None and is_first({}) and not is_first({"LOCAL_RANK": "1"})


def test_the_devices_asked_for_are_those_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("1", 1, gpus=0) == asked("auto", 1, gpus=0) == (1, 1)
    assert asked("auto", 1, gpus=4) == (4, 1)
    assert asked("2", 1, gpus=0) == (2, 1)
    for given, nodes, gpus, message in (
        ("0", 1, 0, "whole numbers from 1"),
        ("two", 1, 0, "whole numbers from 1"),
        ("1", 0, 0, "whole numbers from 1"),
        ("3", 1, 2, "this process sees 2 GPUs"),
        ("2", 2, 2, "torchrun or srun"),
    ):
        with refused(message):
            asked(given, nodes, gpus)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert asked("1", 1, gpus=2) == asked("2", 2, gpus=2) == (2, 2)
    with refused("torchrun has started 2 processes on each of 2 nodes"):
        asked("4", 1, gpus=4)


def test_shares_are_the_rows_of_the_one_batch_and_their_gradients_add_up_to_its(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three ranks, 8 spots a batch and 3 in the last; float64 but for the network: rounding of float32 remains."""
    monkeypatch.setattr(nn.BatchNorm2d, "forward", without_statistics)
    torch.manual_seed(0)
    network = HiFusion(replace(RECIPE.model, dropout=0.0))
    surroundings = Surroundings(RECIPE, [(view, np.arange(len(view.expression))) for view in TRAIN])

    def gradients(rank: int, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found, share = [], Share(rank, ranks)
        for batch in surroundings.training_batches(torch.Generator().manual_seed(5), share):
            network.zero_grad()
            (hifusion_step(network, batch)["total"] * share.weight(batch.spots)).backward()
            flat = torch.cat([its.grad.flatten() for its in network.parameters() if its.grad is not None])
            found.append((flat, batch.target))
        return found

    whole, shares = gradients(0, 1), [gradients(rank, 3) for rank in range(3)]
    assert len(whole) == len(shares[0]) == 5
    for number, (expected, target) in enumerate(whole):
        own = [share[number] for share in shares]
        if len(target) >= 6:
            assert torch.equal(torch.cat([its for _, its in own]), target)
        added = torch.stack([gradient for gradient, _ in own]).sum(0)
        torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_first_rank_draws_what_one_device_draws_and_the_others_their_own() -> None:
    """What `learn_epoch` seeds dropout with; a last 0 changes no SeedSequence."""

    def drawn(*entropy: int) -> int:
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    assert drawn(7, 3, 0) == np.random.SeedSequence([7, 3]).generate_state(2)[0] != drawn(7, 3, 1)


def test_batch_norm_is_joined_on_cuda_alone_and_keeps_its_names_and_predictions() -> None:
    """The conversion only: no GPU was there to train on."""

    def fabric(ranks: int, device: str) -> Any:
        return SimpleNamespace(world_size=ranks, device=torch.device(device))

    torch.manual_seed(0)
    network, region = HiFusion(RECIPE.model).eval(), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    before, names = network(region).expression, list(network.state_dict())
    for ranks, device in ((1, "cuda"), (2, "cpu")):
        assert not devices.waits_in_forward(devices.joint_statistics(network, fabric(ranks, device)))
    joined = devices.joint_statistics(network, fabric(2, "cuda"))
    assert devices.waits_in_forward(joined) and list(joined.state_dict()) == names
    assert not any(isinstance(module, nn.BatchNorm2d) for module in joined.modules())
    assert torch.equal(joined(region).expression, before)


@pytest.mark.parametrize(
    "network, reason",
    [("histogene", "takes whole sections a step"), ("bleep", "contrast between"), ("egn", "correlation over")],
)
def test_networks_whose_step_cannot_be_shared_are_refused_before_anything_starts(
    tmp_path: Path, network: str, reason: str
) -> None:
    recipe = recipes.recipe_for(network, "tiny")
    with refused(f"{network} ", reason, "--devices 1"):
        fit(recipe, PANEL, TRAIN, [], tmp_path / "run", store=make_store(recipe.model.region_px), device_count=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "batch_size, norm",
    [pytest.param(8, False, id="shared out"), pytest.param(3, True, id="whole on each", marks=pytest.mark.slow)],
)
def test_two_processes_end_where_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, norm: bool
) -> None:
    """Both ranks hold the same weights bit for bit; against one process rounding remains.

    Shared out without batch norm, which looks at each share by itself on a CPU; and with it where a batch is too small
    to be shared.
    """
    settings = {"batch_size": batch_size, "norm": norm}
    done = together(tmp_path / "two", **settings)
    assert done.returncode == 0, done.stderr
    if not norm:
        monkeypatch.setattr(nn.BatchNorm2d, "forward", without_statistics)
    fit_small(tmp_path / "one", recipe_for(**settings))
    seen = [json.loads((tmp_path / f"two-rank{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1] and len(set(seen[0])) == 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert set(one) == set(two)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    assert Run.open(tmp_path / "one").facts["devices"] == [1] and Run.open(tmp_path / "two").facts["devices"] == [2]


@pytest.mark.slow
def test_where_one_rank_runs_out_of_memory_all_do_the_batch_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 8, "norm": True}
    assert together(tmp_path / "whole", **settings).returncode == 0
    done = together(tmp_path / "run", full_at=3, **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/weights.safetensors").read_bytes() == (tmp_path / "whole/weights.safetensors").read_bytes()
    assert Run.open(tmp_path / "run").facts["recomputed_from_epoch"] == 0


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    """With two again it is the run that was never killed, bit for bit; with one it tells of both."""
    settings: dict[str, Any] = {"batch_size": 8, "norm": True}
    assert together(tmp_path / "whole", **settings).returncode == 0
    started = time.monotonic()
    assert together(tmp_path / "run", kill_at=7, **settings).returncode != 0  # in the second epoch of 5 steps
    assert time.monotonic() - started < 60
    assert files.read_json(tmp_path / "run" / "run.json")["state"] == "training"
    files_then = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert together(tmp_path / "run", resume=True, **settings).returncode == 0
    assert (tmp_path / "run/weights.safetensors").read_bytes() == (tmp_path / "whole/weights.safetensors").read_bytes()
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name, content in files_then.items():
        (alone / name).write_bytes(content)
    assert together(alone, ranks=1, resume=True, **settings).returncode == 0
    assert Run.open(alone).facts["devices"] == [1, 2]
    again = together(alone, **settings)  # refused by the first rank, which looks at the folder
    assert again.returncode != 0 and again.stderr.count("InputError: ") == 1 and "holds a run already" in again.stderr


@pytest.mark.slow
def test_the_command_line_starts_its_own_processes_and_prints_once(tmp_path: Path) -> None:
    write_her2st(tmp_path / "raw")
    api.prepare(tmp_path / "raw", tmp_path / "store", recipe="tiny", region_px=32)
    changes = [word for change in SMALL for word in ("--set", change)]
    words = ["train", tmp_path / "store", "-o", tmp_path / "run", "--recipe", "tiny", *changes, "--devices", "2"]
    start = [sys.executable, "-m", "hifusion", *map(str, words), "--json"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == [2]
    assert Run.open(tmp_path / "run").facts["devices"] == [2]
