"""The memory that predicting a slide takes does not grow with the slide."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fabricate_slides import tissue_painter, write_pyramid
from hifusion.section import read_section
from views import fit_small

TILE = 512
SIDES_PX = (10_000, 40_000, 100_000)
PEAK = "from hifusion.costs import host_peak_mib; print(int(host_peak_mib()))"


def stained_tile() -> np.ndarray:
    """Purple with darker nuclei of 16 px."""
    nuclei = (np.random.default_rng(0).random((TILE // 16, TILE // 16)) < 0.3).repeat(16, axis=0).repeat(16, axis=1)
    return np.where(nuclei[..., None], [90, 40, 110], [170, 100, 160]).astype(np.uint8)


def predict_within(run: Path, slide: Path, out: Path) -> int:
    """Predict in a process of its own; gives its peak resident memory in MiB."""
    command = f"from hifusion import api; api.predict({str(run)!r}, {str(slide)!r}, {str(out)!r}); {PEAK}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_peak_memory_stays_under_3_gib_and_is_flat_once_the_mask_has_its_full_size(tmp_path: Path) -> None:
    """The same disc of 4 mm in the middle of 25, 400 and 2500 square mm; all of it is predicted. The mask reaches its
    2500 px at 20 mm, so from there on nothing grows."""
    fit_small(tmp_path / "run")
    peaks, spots = [], []
    for side in SIDES_PX:
        paint = tissue_painter((side, side), TILE, tissue_px=8000, texture=stained_tile())
        slide = write_pyramid(
            tmp_path / f"{side}.tif", paint, size_px=(side, side), tile=TILE, levels=7, mpp=0.5, compression="zstd"
        )
        peaks.append(predict_within(tmp_path / "run", slide, tmp_path / f"out{side}"))
        spots.append(read_section(tmp_path / f"out{side}" / "section.h5ad").n_obs)
    assert max(peaks) < 3 * 1024, peaks
    assert peaks[2] < 1.15 * peaks[1], peaks
    assert min(spots) > 200 and max(spots) < 1.4 * min(spots), spots  # how much of a drawn disc is tissue to the finder
