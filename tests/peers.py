"""Golden figures of rival networks: what fabricates their weights and inputs, and how ours are held against them."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def fabricator(golden_root: Path, name: str) -> ModuleType:
    """The module `name`.py of the golden folder, which makes weights and inputs from a seed."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", golden_root / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(golden_root: Path, model: str) -> dict[str, Any]:
    """What the published network computed, by name."""
    with np.load(golden_root / f"{model}_expected.npz") as file:
        return dict(file)


def seed_of(expected: dict[str, Any], fabricate: ModuleType) -> int:
    """The seed that figures were made with: their own where they say it, else the fabricator's."""
    return int(expected.get("seed", fabricate.SEED))


def tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arrays as tensors; floats in the given dtype."""
    return {name: torch.tensor(a).to(dtype) if a.dtype.kind == "f" else torch.tensor(a) for name, a in arrays.items()}


def gradient_norms(module: nn.Module, names: dict[str, str]) -> dict[str, float]:
    """Published name -> norm of the gradient of each parameter; NaN where none reached it."""
    return {
        names[own]: float("nan") if p.grad is None else p.grad.double().norm().item()
        for own, p in module.named_parameters()
    }


def assert_same(computed: Any, expected: np.ndarray, rtol: float = 1e-8) -> None:
    """Equal value by value in float64; the floor, far below `rtol` of the largest value, is for sums that cancel."""
    computed = computed.detach().numpy() if isinstance(computed, Tensor) else np.asarray(computed)
    np.testing.assert_allclose(computed, expected, rtol=rtol, atol=1e-12 * np.abs(expected).max())


def assert_close(computed: Any, expected: np.ndarray, share: float) -> None:
    """Equal to a share of the largest value: in float32, single values near 0 lose their digits to cancellation."""
    computed = computed.detach().numpy() if isinstance(computed, Tensor) else np.asarray(computed)
    np.testing.assert_allclose(computed, expected, rtol=0, atol=share * np.abs(expected).max())


def assert_same_gradients(ours: dict[str, float], names: np.ndarray, norms: np.ndarray, floor: float = 1e-9) -> None:
    """Every gradient norm agrees to 1e-8, or to `floor` where it vanishes but for rounding.

    The expected NaN stand for parameters that no gradient reaches; ours lack these or have no gradient there either.
    """
    expected = {str(name): float(norm) for name, norm in zip(names, norms, strict=True) if not np.isnan(norm)}
    reached = {name: norm for name, norm in ours.items() if not np.isnan(norm)}
    assert sorted(reached) == sorted(expected)
    wrong = {n: (reached[n], norm) for n, norm in expected.items() if abs(reached[n] - norm) > 1e-8 * norm + floor}
    assert not wrong
