"""Timing: ratios from one run, the candidates taking turns, and the two matrix products that say what is possible."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

GFLOP = 18.25  # of one spot forward through the published network at 250 genes; a training step is three times that
_SIDE = 2048  # of the square matrices


class Row(NamedTuple):
    """One line of the table."""

    part: str
    what: str
    value: float
    unit: str
    note: str = ""


def in_turn(candidates: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Seconds of each candidate: the median over rounds in which each runs once, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(its) for name, its in seconds.items()}


def product(dtype: torch.dtype, device: str = "cpu", side: int = _SIDE) -> Callable[[], object]:
    """A product of two square matrices, to be timed beside what it bounds."""
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = 4 if device == "cpu" else 50

    def run() -> None:
        for _ in range(times):
            one @ other

    run.gflop = 2 * side**3 * times / 1e9  # type: ignore[attr-defined]
    return run


def product_rates(seconds: dict[str, float], products: dict[str, Callable[[], object]]) -> dict[str, float]:
    """GFLOP/s of the timed products."""
    return {name: run.gflop / seconds[name] for name, run in products.items()}  # type: ignore[attr-defined]
