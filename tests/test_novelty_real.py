"""What a run on one real section says of other tissue, of artefacts and of wrong scales (docs/slides.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from hifusion import api
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort
from hifusion.data import split_spots
from hifusion.inference import best_device, forward_regions
from hifusion.lattice import lattice
from hifusion.slide import Slide
from hifusion.tissue import find_tissue

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, her2st_root: Path) -> tuple[Run, Cohort]:
    """The `quick` recipe on section C2, in minutes."""
    root = tmp_path_factory.mktemp("novelty")
    api.prepare(her2st_root, root / "store", recipe="quick", sections=["B4", "C2", "C3", "C4", "C5"])
    return api.train(root / "store", root / "run", recipe="quick", sections=["C2"]), Cohort.open(root / "store")


def share_above_one(run: Run, regions: np.ndarray) -> float:
    """Of region patches uint8 ``(N, R, R, 3)``."""
    batches = torch.from_numpy(np.array(regions)).permute(0, 3, 1, 2).split(16)
    outputs = forward_regions(run.network(best_device()), batches, precision=run.facts["precision"])
    novelty = run.novelty
    assert novelty is not None
    return float((novelty.of(np.concatenate([batch.embedding for batch in outputs])) > 1).mean())


def held_out_regions(run: Run, cohort: Cohort) -> np.ndarray:
    view = cohort.view("C2", run.panel, run.recipe.normalisation)
    assert view.regions is not None
    return np.array(view.regions[split_spots(view, run.recipe.validation_fraction, run.facts["seed"])[1]])


def test_sections_of_the_same_tumour_are_known_ground_and_other_tissue_is_less_so(
    trained: tuple[Run, Cohort], data_root: Path
) -> None:
    run, cohort = trained
    shares = {name: share_above_one(run, cohort.store.regions(name)) for name in cohort.sections if cohort.store}
    assert max(shares[name] for name in ("C3", "C4", "C5")) < 0.15
    assert shares["B4"] > 2 * max(shares[name] for name in ("C3", "C4", "C5"))
    skin = Slide(data_root / "wsi" / "CMU-1-Small-Region.svs")
    mpp = skin.require_mpp()
    centres = lattice(find_tissue(skin), mpp, pitch_um=80).centres_px
    px, region_mpp = run.recipe.model.region_px, run.recipe.region_mpp
    assert region_mpp is not None
    regions = np.stack([skin.read_patch(x, y, px, region_mpp / mpp)[0] for x, y in centres])
    assert share_above_one(run, regions) > 0.2


def test_artefacts_are_told(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    regions = held_out_regions(run, cohort)
    rng = np.random.default_rng(0)
    blurred = [np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(8))) for one in regions]
    stripes = (np.indices(regions.shape[1:3]).sum(axis=0) % 224 < 110)[..., None]
    artefacts = {
        "blurred by 8 px": np.stack(blurred),
        "blue ink": np.where(stripes, np.uint8([20, 30, 140]), regions),
        "glass": rng.normal(240, 3, regions.shape).clip(0, 255).astype(np.uint8),
        "noise": rng.integers(0, 256, regions.shape, dtype=np.uint8),
        "a flat colour": np.full_like(regions, 255),
    }
    shares = {name: share_above_one(run, pixels) for name, pixels in artefacts.items()}
    assert min(shares.values()) > 0.8, shares
    assert share_above_one(run, regions) < 0.1
