"""What a network costs: its weights, the operations of a forward pass, and the memory of this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_MIB = 1 << 20


def network_costs(forward: Callable[[], Any], module: nn.Module, spots: int) -> dict[str, float]:
    """Weights and operations of a network, as ``parameters, trainable, gflop_per_spot``.

    Operations are those of matrix products, attention and convolutions, a multiplication and its addition counted as
    two. Norms, activations, interpolation and sparse products are not counted.

    Parameters
    ----------
    forward
        Runs the network once, in evaluation mode and without gradients. Attention is computed by plain matrix products
        meanwhile, because the counter does not see into every fused kernel: for a whole section at once that takes
        memory for all pairs of spots.
    module
        The network; it is left in the modes it was in.
    spots
        How many spots that one pass predicts.
    """
    modes = {part: part.training for part in module.modules()}
    learned = [its for its in module.parameters() if its.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False)
    module.eval().requires_grad_(False)  # the counter would hang hooks on parameters that are a module's input
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part, training in modes.items():
            part.training = training
        for parameter in learned:
            parameter.requires_grad_(True)
    return {
        "parameters": sum(its.numel() for its in module.parameters()),
        "trainable": sum(its.numel() for its in module.parameters() if its.requires_grad),
        "gflop_per_spot": counter.get_total_flops() / spots / 1e9,
    }


def peak_memory_mib() -> float:
    """The most memory that this process has held so far, MiB: of the GPU where CUDA was used, else of the machine.

    It never falls within a process (on a GPU, until ``torch.cuda.reset_peak_memory_stats``), so each model that is to
    have a figure of its own needs a process of its own. NaN on Windows, which does not tell.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / _MIB
    return host_peak_mib()


def host_peak_mib() -> float:
    """The most memory of the machine that this process has held so far, MiB; NaN on Windows, which does not tell."""
    # Not by getrusage on Linux: there a process begins with the peak of the one that started it.
    status = Path("/proc/self/status")
    held = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    if "VmHWM" in held:  # some sandboxes leave it out
        return int(held["VmHWM"].split()[0]) / 1024
    if sys.platform == "win32":
        return float("nan")
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024  # bytes on macOS, KiB elsewhere
