"""Golden figures of the classic published networks: their fabricated weights and inputs, and how they are compared."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def fabricator(golden_root: Path) -> ModuleType:
    """The module that fabricates weights and inputs, from the folder of golden figures."""
    spec = importlib.util.spec_from_file_location("golden_fabricate_classics", golden_root / "fabricate_classics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(golden_root: Path, model: str) -> dict[str, Any]:
    """What the published network computed, by name."""
    with np.load(golden_root / f"{model}_expected.npz") as file:
        return dict(file)


def tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arrays as tensors; floats in the given dtype."""
    return {name: torch.tensor(a).to(dtype) if a.dtype.kind == "f" else torch.tensor(a) for name, a in arrays.items()}


def gradient_norms(module: nn.Module, names: dict[str, str]) -> dict[str, float]:
    """Published name -> norm of the gradient, of the parameters that are under a published name."""
    return {
        names[own]: float("nan") if p.grad is None else p.grad.double().norm().item()
        for own, p in module.named_parameters()
    }


def gradient_differences(ours: dict[str, float], expected: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Gradients that differ by more than 1e-8 relative and 1e-9 absolute (the floor of those that vanish).

    The expected NaN stand for parameters that no gradient reaches: we do not have these.
    """
    norms = dict(zip(map(str, expected["grad_names"]), expected["grad_norms"], strict=True))
    reached = {name: norm for name, norm in norms.items() if not np.isnan(norm)}
    assert sorted(ours) == sorted(reached)
    return {
        name: (ours[name], norm) for name, norm in reached.items() if not abs(ours[name] - norm) <= 1e-8 * norm + 1e-9
    }


def share_left(model: nn.Module, error: Callable[[], Tensor], lr: float = 1e-2, steps: int = 40) -> float:
    """Error after some steps of Adam over the error before, on one thread: networks this small gain nothing by more."""
    threads, optimiser, history = torch.get_num_threads(), torch.optim.Adam(model.parameters(), lr=lr), []
    torch.set_num_threads(1)
    try:
        for _ in range(steps):
            loss = error()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.append(loss.item())
    finally:
        torch.set_num_threads(threads)
    return history[-1] / history[0]
