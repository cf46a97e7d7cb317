"""(b) The data path: a row of the store to standardised pixels, against a PNG a spot and two worker processes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.baseline import PNG_PX, PngSpots
from benchmarks.clock import Row, in_turn
from benchmarks.sections import views
from hifusion.allocator import keep_freed_memory
from hifusion.cohort import SectionView
from hifusion.data import batches
from hifusion.inference import resolve_precision
from hifusion.models.hifusion import standardise

SPOTS, BATCH = 128, 32


def run(work: Path, rounds: int = 3) -> list[Row]:
    """Both deliver shuffled, turned and standardised region and spot patches, ready for the first convolution."""
    keep_freed_memory()  # as training does
    view = views(work)[0]
    rows = np.arange(min(SPOTS, len(view.centres_px)))
    pngs = _pngs(work / "png", view, len(rows))
    bf16 = resolve_precision("auto", torch.device("cpu")) == "bf16-mixed"
    dtype = torch.bfloat16 if bf16 else torch.float32

    def ours() -> None:
        for batch in batches(
            [view],
            [rows],
            batch_size=BATCH,
            by_section=True,
            augment=True,
            generator=torch.Generator().manual_seed(0),
        ):
            standardise(batch.region, dtype), standardise(batch.region[:, :, 112:336, 112:336], dtype)

    loader = DataLoader(PngSpots(pngs), batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True)

    def published() -> None:
        for _ in loader:
            pass

    seconds = in_turn({"published": published, "hifusion": ours}, rounds)
    rates = {name: len(rows) / its for name, its in seconds.items()}
    ratio = rates["hifusion"] / rates["published"]
    return [
        Row("data path", "published: PNG, two workers", round(rates["published"], 1), "spots/s"),
        Row("data path", "hifusion: store", round(rates["hifusion"], 1), "spots/s", f"{ratio:.1f}x published"),
    ]


def _pngs(folder: Path, view: SectionView, spots: int) -> list[Path]:
    """A picture a spot of the released code's size; its middle is the stored region, mirrored outwards."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{spot}.png" for spot in range(spots)]
    for spot, path in enumerate(paths):
        if not path.exists():
            border = (PNG_PX - view.regions.shape[1]) // 2
            pixels = np.pad(view.regions[spot], ((border, border), (border, border), (0, 0)), mode="symmetric")
            Image.fromarray(pixels).save(path)
    return paths
