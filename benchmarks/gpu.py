"""On a GPU: the network against the matrix product, and the whole HER2 2D protocol (4 folds, 50 epochs, 10,200 spots).

`python -m benchmarks.gpu` on the machine with the GPU. Images and counts are made up, at their real sizes; the training
is the package's own. `--spots 64 --epochs 1 --folds 1` is the same script at a size for a CPU.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import ours
from benchmarks.clock import GFLOP, in_turn, product, product_rates
from hifusion import training
from hifusion.cohort import SectionView
from hifusion.expression import GenePanel
from hifusion.inference import best_device, fast_network, resolve_precision
from hifusion.prediction import predict_all, run_precision, run_surroundings
from hifusion.recipes import recipe
from hifusion.store import Store

REGION_PX = 448


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--spots", type=int, default=10_200, help="of the cohort; 36 sections as the study has")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--folds", type=int, default=4, help="of 4, one after the other")
    parser.add_argument("--genes", type=int, default=250)
    parser.add_argument("--batch", type=int, default=64, help="spots of the bare forward pass and step")
    parser.add_argument("--out", type=Path, default=Path("build/bench/gpu.json"))
    given = parser.parse_args()
    device = best_device()
    facts = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    facts |= _bare(device, given.batch, given.genes)
    facts |= _protocol(given.spots, given.epochs, given.folds, given.genes)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(facts, indent=1) + "\n")
    for name, value in facts.items():
        print(f"{name:32} {value}")


def _bare(device: torch.device, batch: int, genes: int) -> dict[str, object]:
    """Forward pass and training step on pixels that are on the device already, as shares of the bf16 product."""
    precision = resolve_precision("auto", device)
    network = ours.network(genes, device.type)
    fast = fast_network(network, precision)
    pixels, target = ours.regions(batch, REGION_PX, device.type), torch.randn(batch, genes, device=device)
    step = ours.step(network, pixels, target, torch.optim.Adam(network.parameters(), 1e-4, fused=True))

    def forward() -> None:
        with torch.inference_mode():
            fast(pixels)

    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    side = 8192 if device.type == "cuda" else 2048
    products = {"product": product(dtype, device.type, side)}
    seconds = in_turn({**products, "forward": forward, "step": step})
    rate = product_rates(seconds, products)["product"]
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        step()
    total = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda its: -getattr(its, total))
    whole = sum(getattr(its, total) for its in events)
    return {
        "product_tflops": round(rate / 1e3, 2),
        "forward_spots_per_s": round(batch / seconds["forward"], 1),
        "forward_share_of_product": round(batch * GFLOP / seconds["forward"] / rate, 3),
        "step_spots_per_s": round(batch / seconds["step"], 1),
        "step_share_of_product": round(batch * 3 * GFLOP / seconds["step"] / rate, 3),
        "where_a_step_goes": {its.key[:60]: round(getattr(its, total) / whole, 3) for its in events[:12]},
    }


def _protocol(spots: int, epochs: int, folds: int, genes: int) -> dict[str, object]:
    """Train on three quarters of the sections and predict the rest, fold by fold."""
    names = tuple(f"G{number}" for number in range(genes))
    panel = GenePanel(names, "file")
    wanted = recipe("her2st_2d", None, [f"epochs={epochs}", f"panel_size={genes}"])
    sections = min(36, max(4, spots // 16))
    views = [_section(number, spots // sections, names) for number in range(sections)]
    started, seen = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), {"region_px": REGION_PX, "mpp": None, "sections": {}})
        for fold in range(folds):
            tested = views[fold::4]
            train = [view for view in views if all(view is not its for its in tested)]
            run = training.fit(wanted, panel, train, [], Path(folder) / f"fold{fold}", store=store)
            precision = run_precision(run)
            network = fast_network(run.network(best_device()), precision)
            for view in tested:
                predict_all(network, run_surroundings(run), view, precision)
            seen += run.facts["train_spots"] * epochs
    seconds = time.perf_counter() - started
    return {
        "protocol": f"{folds} folds x {epochs} epochs x {spots} spots x {genes} genes",
        "protocol_minutes": round(seconds / 60, 2),
        "protocol_training_spots_per_s": round(seen / seconds, 1),
    }


def _section(number: int, spots: int, genes: tuple[str, ...]) -> SectionView:
    """Made-up pixels and expression on a square array."""
    rng = np.random.default_rng(number)
    row, column = np.divmod(np.arange(spots), max(4, int(spots**0.5)))
    return SectionView(
        name=f"{'ABCDEFGH'[number % 8]}{number // 8 + 1}",
        patient="ABCDEFGH"[number % 8],
        genes=genes,
        expression=rng.normal(-6, 1, (spots, len(genes))).astype(np.float32),
        total_counts=np.full(spots, 5000.0),
        centres_px=np.stack([column, row], 1) * 290.0 + 500.0,
        pitch_px=290.0,
        mpp=0.688,
        spot_diameter_um=100.0,
        regions=rng.integers(0, 256, (spots, REGION_PX, REGION_PX, 3), dtype=np.uint8),
    )


if __name__ == "__main__":
    main()
