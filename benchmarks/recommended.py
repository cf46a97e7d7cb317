"""The recommended recipe: what is seen of a section, against the published network, and a training from nothing."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.baseline import Published
from benchmarks.clock import Row, in_turn
from benchmarks.sections import store, views
from hifusion import api
from hifusion.appearance import appearance
from hifusion.encoders import load_encoder
from hifusion.recipes import recipe

BATCH = 8


def run(work: Path, rounds: int = 3) -> list[Row]:
    """Section and network take turns; then a run is trained, features included."""
    view, wanted = replace(views(work)[0], cache=None), recipe("recommended")
    encoder, published = load_encoder(wanted.encoder), Published().eval()
    images = torch.randn(BATCH, 3, 448, 448), torch.randn(BATCH, 3, 224, 224)
    assert wanted.region_mpp is not None
    candidates = {
        "recommended": lambda: appearance(view, encoder, wanted.model, wanted.region_mpp),
        "published": lambda: published(*images),
    }
    with torch.inference_mode():
        seconds = in_turn(candidates, rounds)
    ours, theirs = len(view.centres_px) / seconds["recommended"], BATCH / seconds["published"]
    made = store(work)
    shutil.rmtree(made / "cache", ignore_errors=True)
    shutil.rmtree(work / "recommended", ignore_errors=True)
    started = time.perf_counter()
    trained = api.train(made, work / "recommended")
    minutes = (time.perf_counter() - started) / 60
    return [
        Row("recommended", "published network, eager float32", round(theirs, 1), "spots/s"),
        Row("recommended", "a slide seen", round(ours, 1), "spots/s", f"{ours / theirs:.2f} x, slide opened anew"),
        Row("recommended", "training", round(minutes, 2), "min", f"{trained.facts['train_spots']} spots, from nothing"),
    ]
