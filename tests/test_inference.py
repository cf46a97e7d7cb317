"""Precision made definite, and the forward pass over many patches."""

import numpy as np
import pytest
import torch

from hifusion.inference import forward_regions, predict_regions, resolve_precision
from hifusion.models.hifusion import HiFusion, HiFusionConfig
from hifusion.models.symmetries import eight_symmetries

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> HiFusion:
    """A network with levels of 64 and 32 px, and running statistics of its own."""
    torch.manual_seed(0)
    config = HiFusionConfig(n_genes=5, grids=(1, 2), spot_px=64, region_px=96, width=8, heads=4)
    network = HiFusion(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for _ in range(3):
            network(pixels(8))
    return network


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 96, 96, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def test_the_size_of_batches_does_not_change_a_prediction(network: HiFusion) -> None:
    """In evaluation mode a spot's prediction knows nothing of the other spots of its batch."""
    region = pixels(13)
    whole, by_four, single = (predict_regions(network, region.split(size), precision="32-true") for size in (13, 4, 1))
    assert whole.shape == (13, 5) and whole.dtype == np.float32
    np.testing.assert_allclose(by_four, whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-5)
    assert whole.std(axis=0).min() > 1e-3  # spots do differ


def test_bfloat16_agrees_with_float32_to_a_twentieth_of_the_spread(network: HiFusion) -> None:
    region = pixels(12)
    exact = predict_regions(network, [region], precision="32-true")
    rough = predict_regions(network, [region], precision="bf16-mixed")
    assert rough.dtype == np.float32
    error = np.sqrt(np.mean((rough - exact) ** 2))
    assert 0 < error < 0.05 * exact.std()


def test_a_network_is_left_in_evaluation_mode_and_unchanged(network: HiFusion) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    predict_regions(network, [pixels(4)], precision="32-true")
    assert not any(module.training for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_spots_just_done_are_told_batch_by_batch(network: HiFusion) -> None:
    told: list[int] = []
    predict_regions(network, pixels(7).split(3), precision="32-true", on_batch=told.append)
    assert told == [3, 3, 1]


def test_the_mean_over_symmetries_does_not_change_when_the_patch_is_turned_or_mirrored(network: HiFusion) -> None:
    def averaged(region: torch.Tensor) -> np.ndarray:
        (outputs,) = forward_regions(network, [region], precision="32-true", average_symmetries=True)
        return outputs.expression

    region = pixels(3)
    expected, plain = averaged(region), predict_regions(network, [region], precision="32-true")
    assert np.abs(plain - expected).max() > 1e-3
    for view in eight_symmetries(region):
        np.testing.assert_allclose(averaged(view), expected, rtol=0, atol=1e-5)


def test_the_embedding_is_what_the_head_reads(network: HiFusion) -> None:
    (outputs,) = forward_regions(network, [pixels(3)], precision="32-true")
    with torch.inference_mode():
        again = network.head(network.norm(torch.from_numpy(outputs.embedding)))
    np.testing.assert_allclose(again.numpy(), outputs.expression, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bfloat16_on_a_cpu_that_computes_in_it(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", CPU) == ("bf16-mixed" if fast else "32-true")
    assert resolve_precision("32-true", CPU) == "32-true"
    assert resolve_precision("bf16-mixed", CPU) == "bf16-mixed"
