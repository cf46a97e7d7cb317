"""Memory that runs out: the result does not change, and where it must end one line says why."""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fabricate import refused
from hifusion import memory
from hifusion.checkpoint import Run
from hifusion.inference import forward_batches, predict_regions
from hifusion.memory import in_pieces, is_out_of_memory
from hifusion.models import BY_SPOT, MODELS
from hifusion.models.hifusion import HiFusion, HiFusionConfig, hifusion_loss
from hifusion.models.resnet import ENCODERS, RESNET50, BasicBlock, Bottleneck, ResNet
from test_training import Stopped, assert_same_run, read_facts, read_log, stop_at
from views import RECIPE, fit_small

CONFIG = HiFusionConfig(n_genes=3, grids=(1, 2), spot_px=32, region_px=64, width=16, heads=4, dropout=0.2)
ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
    MemoryError,
]


@pytest.fixture
def network() -> HiFusion:
    """With running statistics of its own."""
    torch.manual_seed(0)
    network = HiFusion(CONFIG).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        network(pixels(6))
    return network


def pixels(spots: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (spots, 64, 64, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def full_above(
    network: nn.Module, most: int, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException] = ERRORS[0]
) -> list[int]:
    """A forward pass that fails for more than ``most`` spots; returns where the sizes of all passes are noted."""
    sizes, forward = [], network.forward

    def limited(region: Tensor, **inputs: Tensor) -> Any:
        sizes.append(len(region))
        if len(region) > most:
            raise error()
        return forward(region, **inputs)

    monkeypatch.setattr(network, "forward", limited)
    return sizes


def test_a_real_allocation_that_cannot_be_is_seen() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "mps", "python"])
def test_a_batch_that_does_not_fit_is_predicted_in_pieces(
    network: HiFusion, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]
) -> None:
    """13 spots fail, so do 6; 3 fit, and are what later batches begin with. Rounding differs with a batch's size."""
    batches = [pixels(13, 1), pixels(13, 2), pixels(2, 3)]
    whole = predict_regions(network, batches, precision="32-true")
    sizes = full_above(network, 3, monkeypatch, error)
    pieces = predict_regions(network, batches, precision="32-true")
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5)
    assert sizes == [13, 6, *[3] * 4, 1, *[3] * 4, 1, 2]
    assert not any(module.training for module in network.modules())


def test_embeddings_and_the_mean_over_symmetries_come_in_pieces_too(
    network: HiFusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"precision": "32-true", "average_symmetries": True}
    (whole,) = forward_batches(network, [(pixels(5), {})], **given)
    full_above(network, 2, monkeypatch)
    (pieces,) = forward_batches(network, [(pixels(5), {})], **given)
    for name in ("expression", "embedding"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=0, atol=1e-5)


class _Neighbours(nn.Module):
    """Looks at an input of its spots and at one of the section, as TRIPLEX does."""

    whole_section = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, region: Tensor, section_row: Tensor, section_features: Tensor) -> Any:
        found = section_features[section_row] + region.float().mean((1, 2, 3))[:, None] + section_features.mean()
        return memory.Pieces(found * self.weight, found)


def test_inputs_of_spots_are_split_with_them_and_those_of_the_section_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, region = _Neighbours(), pixels(7)
    given = {"section_row": torch.tensor([9, 1, 4, 4, 0, 7, 2]), "section_features": torch.rand(10, 4)}
    whole = model(region, **given)
    sizes = full_above(model, 2, monkeypatch)
    assert torch.equal(in_pieces(model, region, given).expression, whole.expression)
    assert sizes == [7, 3, 1, *[1] * 6]


def test_what_is_said_to_be_of_a_spot_is_an_input_of_some_network() -> None:
    split = {name for its in MODELS.values() if not its.module.whole_section for name in its.needs}  # type: ignore[attr-defined]
    assert split >= BY_SPOT


def test_one_spot_or_a_whole_section_that_does_not_fit_is_one_line(
    network: HiFusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_above(network, 0, monkeypatch)
    with refused("out of memory (cpu): a single spot of 64 px does not fit"):
        in_pieces(network, pixels(4), {})
    monkeypatch.setattr(network, "whole_section", True, raising=False)
    with refused("HiFusion takes the 4 spots of a section at once"):
        in_pieces(network, pixels(4), {})


def test_other_errors_are_left_alone(network: HiFusion, monkeypatch: pytest.MonkeyPatch) -> None:
    full_above(network, 0, monkeypatch, lambda: RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        in_pieces(network, pixels(4), {})


def learned(network: nn.Module, precision: str = "32-true") -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of one training step, and what it left in the buffers."""
    torch.manual_seed(3)
    network.train()
    network.zero_grad()
    target = torch.randn(6, 3, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        output = network(pixels(6))
    hifusion_loss(output, target)["total"].backward()
    gradients = torch.cat([its.grad.flatten() for its in network.parameters() if its.grad is not None])
    return gradients, {name: value.clone() for name, value in network.named_buffers()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recomputed_activations_give_the_same_gradients_and_statistics_bit_for_bit(precision: str) -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(HiFusion(CONFIG).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    assert memory.recompute(networks[1]) and memory.recomputes(networks[1]) and not memory.recomputes(networks[0])
    for _ in range(2):  # statistics after one step, and on top of it
        (plain, before), (again, after) = (learned(network, precision) for network in networks)
        assert torch.equal(plain, again)
        assert all(torch.equal(before[name], after[name]) for name in before)
    counted = [value for name, value in after.items() if name.startswith("region") and name.endswith("tracked")]
    assert {int(value) for value in counted} == {2}
    assert {its.momentum for its in networks[1].modules() if isinstance(its, nn.BatchNorm2d)} == {0.1}


class _Holds(torch.autograd.Function):
    """Holds on to something until its node is let go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Any) -> Tensor:
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.held is None:
            raise ERRORS[1]()
        return gradient, None


def test_what_a_failed_backward_pass_held_is_let_go_before_the_second_attempt() -> None:
    """The node that fails is the youngest, so the other one is left waiting in the queue."""
    trunk, alive = ResNet(ENCODERS["resnet10"], 16), []

    def attempt() -> bool:
        if trunk.recompute:
            alive.append(held() is not None)
            return True
        x, payload = torch.ones(3, requires_grad=True), nn.Identity()
        refs.append(weakref.ref(payload))
        (_Holds.apply(x, payload) + _Holds.apply(x, None)).sum().backward()
        return False

    refs: list[Any] = []

    def held() -> Any:
        return refs[0]()

    given: dict[str, Any] = {"device": torch.device("cpu"), "generator": torch.Generator(), "advice": ""}
    assert memory.learn(trunk, attempt, agree=lambda failed: failed, **given)
    assert alive == [False]


def kept_mib(network: nn.Module) -> float:
    """What is kept for the backward pass, each memory counted once."""
    held: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        output = network.train()(torch.rand(4, 3, 64, 64))
    del output
    return sum(held.values()) / 2**20


@pytest.mark.parametrize(("blocks", "block"), [(ENCODERS["resnet18"], BasicBlock), (RESNET50, Bottleneck)])
def test_recomputing_keeps_a_small_part_of_the_activations(blocks: Any, block: Any) -> None:
    trunk = ResNet(blocks, 16, block)
    weights = sum(its.numel() * 4 for its in trunk.parameters()) / 2**20
    plain = kept_mib(trunk) - weights
    trunk.recompute = True
    assert kept_mib(trunk) < plain / 3


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Trunks that fail from the 9th training pass on unless they recompute, after their norms have seen the batch.

    Two encoders a step, the first on two grids: the third step fails in its last trunk. Gives, for each pass,
    whether it recomputed.
    """
    forward, passes = ResNet.forward, []

    def limited(trunk: ResNet, images: Tensor) -> Tensor:
        if trunk.training:
            passes.append(trunk.recompute)
        found = forward(trunk, images)
        if trunk.training and not trunk.recompute and len(passes) > 8:
            raise ERRORS[0]()
        return found

    monkeypatch.setattr(ResNet, "forward", limited)
    return passes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with memory enough."""
    return fit_small(tmp_path_factory.mktemp("whole") / "run").root


def test_a_training_that_runs_out_of_memory_gives_the_same_weights_and_says_so(
    whole: Path, tmp_path: Path, small_memory: list[bool]
) -> None:
    run = fit_small(tmp_path / "run")
    assert (run.root / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert small_memory.count(False) == 9 and all(small_memory[9:])  # tried once, remembered
    assert run.facts["recomputed_from_epoch"] == 0 and Run.open(whole).facts["recomputed_from_epoch"] is None
    assert {row["recomputed"] for row in read_log(run.root)} == {"1"}
    told = ("recomputed",)
    assert [{k: v for k, v in row.items() if k not in told} for row in read_log(run.root)] == [
        {k: v for k, v in row.items() if k not in told} for row in read_log(whole)
    ]
    other = {"recomputed_from_epoch": None}
    assert read_facts(run.root) | other == read_facts(whole) | other


def test_a_resumed_run_remembers_it(whole: Path, tmp_path: Path, small_memory: list[bool]) -> None:
    with pytest.raises(Stopped):
        fit_small(tmp_path / "run", progress=stop_at(7))
    small_memory.clear()
    fit_small(tmp_path / "run", resume=True)
    assert small_memory and all(small_memory)
    assert (tmp_path / "run/weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_recomputing_from_the_start_is_the_same_run(whole: Path, tmp_path: Path) -> None:
    asked = fit_small(tmp_path / "run", recompute=True)
    assert (asked.root / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    fit_small(tmp_path / "plain")
    assert_same_run(tmp_path / "plain", whole)


def test_a_step_that_never_fits_is_one_line_that_names_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Tensor:
        raise ERRORS[1]()

    monkeypatch.setattr(ResNet, "forward", full)
    with refused("out of memory (cpu) in a training step, twice", "--set batch_size=4"):
        fit_small(tmp_path / "run", replace(RECIPE, epochs=1))


SCRIPT = """
import resource, sys, torch
from hifusion import memory
from hifusion.inference import predict_regions
from hifusion.models.hifusion import HiFusion, HiFusionConfig, hifusion_loss

how, limit_mib = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
network = HiFusion(HiFusionConfig(n_genes=10, grids=(1, 2), spot_px=112, region_px=224, width=32))
network = network.to(memory_format=torch.channels_last)
region = torch.randint(0, 256, (48, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

def step(spots):
    optimiser.zero_grad()
    hifusion_loss(network.train()(region[:spots]), torch.zeros(spots, 10))["total"].backward()

def told(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) // 1024

optimiser = torch.optim.Adam(network.parameters())
step(2)
before = told("VmSize")
if how == "recompute":
    memory.recompute(network)
if limit_mib:
    resource.setrlimit(resource.RLIMIT_AS, ((before + limit_mib) << 20,) * 2)
memory.learn(network, lambda: step(48), device=torch.device("cpu"), generator=torch.Generator(),
             agree=lambda failed: failed, advice="")
total = sum(float(its.grad.double().abs().sum()) for its in network.parameters())
print(told("VmPeak") - before, memory.recomputes(network), total.hex())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only there a process can be held to so much memory")
def test_a_step_that_really_runs_out_of_memory_ends_with_the_same_gradients() -> None:
    """Held to half way between what the step needs and what it needs when it keeps no activations."""
    # Freed blocks are to go back to the system at once: the limit is on addresses, used or not.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}

    def tried(how: str, limit_mib: int) -> tuple[int, str, str]:
        words = [sys.executable, "-c", SCRIPT, how, str(limit_mib)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        peak, recomputed, gradients = done.stdout.split()
        return int(peak), recomputed, gradients

    plain, without = tried("keep", 0), tried("recompute", 0)
    assert without[0] < plain[0]
    limited = tried("keep", (plain[0] + without[0]) // 2)
    assert (plain[1], limited[1]) == ("False", "True")
    assert limited[2] == plain[2] == without[2]
