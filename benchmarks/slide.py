"""(d) Slide to file: a whole prediction with tissue, lattice, patches, network, tables and pictures."""

import shutil
import time
from pathlib import Path

import torch

from benchmarks import ours
from benchmarks.clock import Row, in_turn
from benchmarks.sections import run as bench_run
from benchmarks.sections import store
from hifusion import api
from hifusion.inference import fast_network
from hifusion.prediction import run_precision
from hifusion.store import Store

STRIDE_UM = 60  # about 2,000 spots on a her2st section


def run(work: Path) -> list[Row]:
    """Dense prediction of the second section's slide, and the network alone on batches of its size before and after."""
    trained = bench_run(work)
    name = list(Store.open(store(work), verify=False).manifest["sections"])[-1]
    facts = Store.open(store(work), verify=False).section(name).uns["hifusion"]
    network = fast_network(trained.network(torch.device("cpu")), run_precision(trained))
    size, side = trained.recipe.batch_size, trained.recipe.model.region_px
    pixels = ours.regions(size, side)

    def alone() -> float:
        with torch.inference_mode():
            return size / in_turn({"network": lambda: network(pixels)}, rounds=5)["network"]

    rates = [alone()]
    out = work / "prediction"
    shutil.rmtree(out, ignore_errors=True)
    started, reports = time.perf_counter(), []
    predicted = api.predict(
        trained.root,
        Path(facts["image"]),
        out,
        mpp=facts["mpp"],
        stride_um=STRIDE_UM,
        workers=1,
        progress=lambda what, done, total: reports.append((done, time.perf_counter())),
    )
    seconds = time.perf_counter() - started
    rates.append(alone())
    network_rate = sum(rates) / 2
    (first, begun), (last, ended) = reports[0], reports[-1]
    streaming = (last - first) / (ended - begun)
    spots = predicted.n_obs
    around = seconds - spots / streaming
    end_to_end = spots / seconds
    how = f"{spots} spots in {seconds:.0f} s, of which {around:.0f} s for tissue, estimate, tables and pictures"
    return [
        Row("slide to file", "network alone", round(network_rate, 1), "spots/s"),
        Row("slide to file", "while it runs", round(streaming, 1), "spots/s", f"{streaming / network_rate:.0%} of it"),
        Row("slide to file", "whole", round(end_to_end, 1), "spots/s", f"{end_to_end / network_rate:.0%} of it; {how}"),
    ]
