"""Costs of networks against counts by hand and the published size."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from hifusion.costs import host_peak_mib, network_costs, peak_memory_mib
from hifusion.models.hifusion import HiFusion, HiFusionConfig


def test_a_linear_layer_costs_two_operations_a_weight_and_spot():
    layer = nn.Linear(300, 200)
    layer.bias.requires_grad_(False)
    costs = network_costs(lambda: layer(torch.zeros(7, 300)), layer, 7)
    assert costs["gflop_per_spot"] == pytest.approx(2 * 300 * 200 / 1e9)
    assert (costs["parameters"], costs["trainable"]) == (300 * 200 + 200, 300 * 200)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_counted_whatever_kernel_would_run_it(need_weights):
    """In and out projection, 4 d^2 products a token; scores and their sum, 2 n d a token."""
    tokens, width = 50, 64
    attention = nn.MultiheadAttention(width, 4, batch_first=True)
    x = torch.zeros(1, tokens, width)
    costs = network_costs(lambda: attention(x, x, x, need_weights=need_weights), attention, tokens)
    assert costs["gflop_per_spot"] == pytest.approx(2 * (4 * width**2 + 2 * tokens * width) / 1e9)


def test_an_encoder_layer_is_not_hidden_by_its_fast_path():
    tokens, width, hidden = 50, 64, 128
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True)
    costs = network_costs(lambda: layer(torch.zeros(1, tokens, width)), layer, tokens)
    by_hand = 2 * (4 * width**2 + 2 * tokens * width + 2 * width * hidden)
    assert costs["gflop_per_spot"] == pytest.approx(by_hand / 1e9)


def test_the_network_is_left_in_its_modes_with_its_statistics():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    network[1].eval()
    before = network[1].running_mean.clone()
    grads = []
    network_costs(lambda: grads.append(network(torch.ones(3, 4)).requires_grad), network, 3)
    assert [part.training for part in network] == [True, False, True] and network.training
    assert torch.equal(network[1].running_mean, before) and grads == [False]


def test_hifusion_at_the_published_size_takes_18_gflop_less_padding_and_17_million_weights():
    """Of the paper's 18.25, the 7 x 7 grid spends 1.07 on taps that meet padding alone on maps of 2 x 2 and 1 x 1."""
    config = HiFusionConfig(n_genes=250)
    network = HiFusion(config)
    region = torch.zeros(2, 3, config.region_px, config.region_px, dtype=torch.uint8)
    costs = network_costs(lambda: network(region), network, 2)
    padding = 3 * (36 - 16) * 256**2 + (9 - 4) * 256 * 512 + 3 * (9 - 1) * 512**2  # multiplications of one tile
    assert costs["gflop_per_spot"] == pytest.approx(18.25 - 49 * 2 * padding / 1e9, abs=0.02)
    assert costs["parameters"] / 1e6 == pytest.approx(17.39, abs=0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_peak_memory_holds_what_was_once_held():
    if torch.cuda.is_available():
        pytest.skip("on a GPU its own memory is told")
    block = torch.ones(100 << 20, dtype=torch.uint8)
    peak = peak_memory_mib()
    assert peak > 100
    del block
    assert peak_memory_mib() > peak - 1  # Linux tells it to a quarter of a MiB


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes begin anew")
def test_peak_memory_is_not_that_of_who_started_the_process():
    block = torch.ones(600 << 20, dtype=torch.uint8)
    command = "from hifusion.costs import host_peak_mib; print(host_peak_mib())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert float(done.stdout) < host_peak_mib() - 200
    del block
