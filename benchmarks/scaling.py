"""(g) Cost against work: 1, 4 and 16 times the spots, the slide's area, and the genes."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import ours
from benchmarks.clock import Row, in_turn
from benchmarks.sections import run as bench_run
from benchmarks.sections import views
from hifusion import api
from hifusion.checkpoint import Run
from hifusion.cohort import SectionView
from hifusion.costs import peak_memory_mib
from hifusion.inference import fast_network, resolve_precision
from hifusion.prediction import predict_all, run_precision, run_surroundings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fabricate_slides import tissue_painter, write_pyramid

TIMES = (1, 4, 16)
SPOTS, SIDE_PX, GENES = 48, 8192, (250, 1000, 5000, 20_000)
TILE = 512


def run(work: Path) -> list[Row]:
    """Times as a power of the work: 1 is linear."""
    trained = bench_run(work)
    return _spots(trained, views(work)[0]) + _area(trained, work) + _genes()


def _power(works: list[float], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(works), np.log(seconds), 1)[0])


def _spots(trained: Run, view: SectionView) -> list[Row]:
    """Rows of the store again and again, through the network that predicts."""
    precision = run_precision(trained)
    network = fast_network(trained.network(torch.device("cpu")), precision)
    surroundings = run_surroundings(trained)

    def predict(times: int) -> None:
        rows = np.arange(SPOTS * times) % len(view.centres_px)
        many = dataclasses.replace(
            view,
            expression=view.expression[rows],
            centres_px=view.centres_px[rows],
            regions=_Repeated(view.regions, rows),
        )
        predict_all(network, surroundings, many, precision)

    seconds = in_turn({str(times): lambda times=times: predict(times) for times in TIMES}, rounds=3)
    power = _power([SPOTS * times for times in TIMES], [seconds[str(times)] for times in TIMES])
    note = ", ".join(f"{SPOTS * times} in {seconds[str(times)]:.1f} s" for times in TIMES)
    return [Row("spots", "seconds ~ spots to the power", round(power, 3), "", note)]


class _Repeated:
    """Rows of region patches, some of them more than once, without a copy."""

    def __init__(self, regions: np.ndarray, rows: np.ndarray):
        self.regions, self.rows, self.shape = regions, rows, (len(rows), *regions.shape[1:])

    def __getitem__(self, key: tuple) -> np.ndarray:
        row, *rest = key
        return self.regions[(self.rows[row], *rest)]


def _area(trained: Run, work: Path) -> list[Row]:
    """Slides that are tissue nearly all over, each predicted in a process of its own."""
    found = []
    for times in TIMES:
        side = int(SIDE_PX * math.sqrt(times))
        slide, out = work / f"slide-{side}.tif", work / f"slide-{side}"
        if not slide.exists():
            _write_slide(slide, side)
        command = [sys.executable, "-m", "benchmarks.scaling", str(trained.root), str(slide), str(out)]
        found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    spots, seconds, peaks = ([its[name] for its in found] for name in ("spots", "seconds", "peak_mib"))
    sides = ", ".join(f"{n} spots in {s:.0f} s" for n, s in zip(spots, seconds, strict=True))
    return [
        Row("slide area", "seconds ~ spots to the power", round(_power(spots, seconds), 3), "", sides),
        Row("slide area", "peak memory, 16x to 1x", round(peaks[-1] / peaks[0], 2), "", f"{peaks} MiB"),
    ]


def _write_slide(path: Path, side: int) -> None:
    """A disc of tissue over glass, as wide as four fifths of the slide, drawn as the tests draw theirs."""
    grain = (np.random.default_rng(0).random((TILE // 16, TILE // 16)) < 0.3).repeat(16, axis=0).repeat(16, axis=1)
    stained = np.where(grain[..., None], [90, 40, 110], [170, 100, 160]).astype(np.uint8)
    paint = tissue_painter((side, side), TILE, tissue_px=side * 4 // 5, texture=stained)
    write_pyramid(path, paint, size_px=(side, side), tile=TILE, levels=5, mpp=0.688, compression="zstd")


def _predict(run_folder: str, slide: str, out: str) -> None:
    """In a process of its own: time and peak memory of a whole slide."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    predicted = api.predict(Path(run_folder), Path(slide), Path(out), workers=1)
    facts = {"spots": predicted.n_obs, "seconds": time.perf_counter() - started, "peak_mib": round(peak_memory_mib())}
    print(json.dumps(facts))


def _genes() -> list[Row]:
    """Prediction and training step of the published network by the size of the panel."""
    pixels, rows = ours.regions(8), []
    precision = resolve_precision("auto", pixels.device)
    forwards, steps = {}, {}
    for genes in GENES:
        network = ours.network(genes)
        fast = fast_network(network, precision)
        forwards[str(genes)] = lambda fast=fast: fast(pixels)
        steps[str(genes)] = ours.step(network, pixels, torch.randn(8, genes), None)
    with torch.inference_mode():
        seconds = in_turn(forwards, rounds=3)
    for what, its in (("prediction", seconds), ("training step without its optimiser", in_turn(steps, rounds=2))):
        first, last = its[str(GENES[0])], its[str(GENES[-1])]
        note = ", ".join(f"{genes}: {8 / its[str(genes)]:.1f}/s" for genes in GENES)
        rows.append(Row("genes", f"{what}, {GENES[-1]} to {GENES[0]} genes", round(last / first, 2), "x time", note))
    return rows


if __name__ == "__main__":
    _predict(*sys.argv[1:])
