"""A run as a tile model of LazySlide: against what LazySlide asks of one, and in LazySlide where it is installed.

What it asks was read in lazyslide 0.13.0 (``tools/_tile_prediction.py``) and lazyslide-models 0.1.0 (``base.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hifusion.checkpoint import Run
from hifusion.errors import InputError
from hifusion.inference import predict_regions
from hifusion.slide import Slide
from hifusion.tiles import TilePredictor, region_mpp, tiling
from views import GENES, RECIPE, fit_small, make_store

REGION_PX = RECIPE.model.region_px
MPP = 1.0
SLIDE_MPP = 0.5
CPU = torch.device("cpu")


@runtime_checkable
class TilePredictionModelProtocol(Protocol):
    """LazySlide's protocol of this name, with what it inherits."""

    model: Any
    name: str
    columns: tuple[str, ...] | None

    def get_transform(self) -> Callable | None: ...
    def to(self, device: Any) -> Any: ...
    def try_compile(self, **compile_kws: Any) -> Any: ...
    def predict(self, image: Any, *args: Any, **kwargs: Any) -> dict[str, Any]: ...


@dataclass
class Spec:
    """What is looked at of LazySlide's TileSpec."""

    width: int = REGION_PX
    height: int = REGION_PX
    mpp: float | None = MPP


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained on regions of 32 px of 1 um around spots that are 200 um apart, on slides of 5 um per px."""
    recipe = replace(RECIPE, region_mpp=MPP, epochs=1)
    return fit_small(tmp_path_factory.mktemp("run") / "run", recipe, store=make_store(REGION_PX, MPP))


@pytest.fixture(scope="module")
def native(run: Run) -> Run:
    """The same, as if trained on native pixels."""
    return replace(run, recipe=replace(run.recipe, region_mpp=None))


def without_spots(run: Run) -> Run:
    """A run of the time before runs kept the scale of their spots."""
    return replace(run, facts={name: value for name, value in run.facts.items() if name != "spots"})


def pixels(count: int, side: int = REGION_PX) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def expression_of(run: Run, tiles: np.ndarray) -> np.ndarray:
    """What the package itself says of region patches, ``(N, R, R, 3)`` -> ``(N, G)``."""
    regions = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    return predict_regions(run.network(CPU), [regions], precision=run.facts["precision"])


def as_lazyslide_does(model: TilePredictionModelProtocol, tiles: np.ndarray, batch_size: int) -> pd.DataFrame:
    """The loop of LazySlide's ``tile_prediction``: what it calls, in its order and with its keywords."""
    model.to(device="cpu")
    transform = model.get_transform()
    assert transform is not None
    parts = []
    with torch.inference_mode():
        for batch in DataLoader([{"image": transform(tile)} for tile in tiles], batch_size=batch_size):
            parts.append(pd.DataFrame(model.predict(batch["image"].to("cpu", non_blocking=False))))
    return pd.concat(parts).reset_index(drop=True)


def test_the_model_has_all_that_lazyslide_asks_of_one(run: Run) -> None:
    model = TilePredictor(run)
    assert isinstance(model, TilePredictionModelProtocol)
    assert model.columns == GENES
    assert model.to("cpu") is model


def test_the_protocol_above_is_that_of_the_installed_library(run: Run) -> None:
    try:
        from lazyslide_models import TilePredictionModelProtocol as Theirs
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision does not fit this torch
        pytest.skip(f"lazyslide_models cannot be imported ({error})")
    assert isinstance(TilePredictor(run), Theirs)


def test_lazyslides_loop_gives_the_packages_own_expression_tile_by_tile(run: Run) -> None:
    tiles = pixels(5)
    table = as_lazyslide_does(TilePredictor(run), tiles, batch_size=2)
    assert tuple(table.columns) == GENES
    assert (table.dtypes == np.float32).all()
    assert table.to_numpy() == pytest.approx(expression_of(run, tiles), abs=1e-5)
    assert table.std().min() > 0


def test_the_transform_only_puts_the_channels_first(run: Run) -> None:
    tile = pixels(1)[0]
    tile.flags.writeable = False  # as some readers hand them out
    region = TilePredictor(run).get_transform()(tile)
    assert region.dtype == torch.uint8
    assert np.array_equal(region.numpy(), tile.transpose(2, 0, 1))


def test_the_transform_can_be_sent_to_loader_processes(run: Run) -> None:
    assert ForkingPickler.dumps(TilePredictor(run).get_transform())  # a function inside another one cannot be sent


def test_mixed_precision_of_lazyslide_does_not_change_the_runs_own(run: Run) -> None:
    model, image = TilePredictor(run), torch.from_numpy(pixels(3)).permute(0, 3, 1, 2)
    plain = model.predict(image)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.predict(image)
    assert all(np.array_equal(plain[gene], mixed[gene]) for gene in GENES)


def test_a_compiled_model_says_the_same(run: Run) -> None:
    model, image = TilePredictor(run), torch.from_numpy(pixels(3)).permute(0, 3, 1, 2)
    plain = model.predict(image)
    model.try_compile(backend="eager")
    compiled = model.predict(image)
    assert all(compiled[gene] == pytest.approx(plain[gene], abs=1e-5) for gene in GENES)


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.zeros(2, 3, 24, REGION_PX, dtype=torch.uint8), "tiles are 32 x 24 px, the run reads 32 x 32; cut them"),
        (torch.zeros(2, 3, REGION_PX, REGION_PX), "tiles are torch.float32, the run reads uint8 pixels; leave"),
    ],
)
def test_tiles_that_the_run_cannot_read_are_refused_as_they_come(run: Run, image: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TilePredictor(run).predict(image)


@pytest.mark.parametrize(
    "spec, message",
    [
        (Spec(width=64), "tiles are 64 x 32 px, the run reads 32 x 32"),
        (Spec(mpp=0.5), "tiles have 0.5 um per px, the run reads 1.0"),
        (Spec(mpp=None), "tiles have None um per px, the run reads 1.0"),
    ],
)
def test_tiles_of_another_size_or_scale_are_refused_at_the_door(run: Run, spec: Spec, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TilePredictor(run, spec)


def test_a_scale_that_was_rounded_is_the_scale(run: Run) -> None:
    assert TilePredictor(run, Spec(mpp=1.004)).columns == GENES


def test_without_a_known_scale_only_the_size_of_tiles_is_checked(native: Run) -> None:
    assert TilePredictor(without_spots(native), Spec(mpp=0.25)).columns == GENES
    with pytest.raises(InputError, match="tiles have 0.25 um per px, the run reads 5.0"):
        TilePredictor(native, Spec(mpp=0.25))


def test_tiles_are_cut_at_the_scale_of_the_regions_and_the_pitch_of_the_spots(run: Run, native: Run) -> None:
    assert tiling(run) == {"tile_px": 32, "stride_px": 200, "mpp": 1.0}
    assert tiling(native) == {"tile_px": 32, "stride_px": 40, "mpp": 5.0}
    assert tiling(run, pitch_um=55.4) == {"tile_px": 32, "stride_px": 55, "mpp": 1.0}


def test_a_run_that_kept_no_spots_needs_a_pitch_and_on_native_pixels_cannot_say_its_scale(
    run: Run, native: Run
) -> None:
    assert tiling(without_spots(run), pitch_um=100) == {"tile_px": 32, "stride_px": 100, "mpp": 1.0}
    with pytest.raises(InputError, match="does not say how far apart its spots are; give pitch_um"):
        tiling(without_spots(run))
    assert region_mpp(without_spots(native)) is None
    with pytest.raises(InputError, match="was trained on native pixels and does not say how wide they are"):
        tiling(without_spots(native), pitch_um=100)


@pytest.mark.parametrize("pitch_um", [0.0, -100.0, 0.9, float("nan"), float("inf")])
def test_a_pitch_that_is_no_distance_between_tiles_is_refused(run: Run, pitch_um: float) -> None:
    with pytest.raises(InputError, match="is not possible; use at least the 1.0 um of one pixel"):
        tiling(run, pitch_um)


# In LazySlide itself ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zs() -> ModuleType:
    return pytest.importorskip("lazyslide", reason="lazyslide is not installed; `pip install lazyslide` to test in it")


def write_slide(path: Path, colours: np.ndarray) -> Path:
    """A tiled TIFF, as OpenSlide and LazySlide read them, that says its scale."""
    per_cm = 1e4 / SLIDE_MPP
    tifffile.imwrite(path, colours, tile=(64, 64), photometric="rgb", resolution=(per_cm, per_cm), resolutionunit=3)
    return path


def predicted_and_expected(zs: ModuleType, wsi: Any, run: Run, slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """Expression in ``wsi["tiles"]``, and what the package says where its own patches are read at the same centres."""
    zs.tl.tile_prediction(wsi, TilePredictor(run, wsi.tile_spec("tiles")), batch_size=7, pbar=False)
    tiles = wsi["tiles"]
    box = tiles.bounds
    centres = zip((box.minx + box.maxx) / 2, (box.miny + box.maxy) / 2, strict=True)
    shrink = MPP / slide.require_mpp()
    patches = np.stack([slide.read_patch(x, y, REGION_PX, shrink)[0] for x, y in centres])
    return tiles[list(GENES)].to_numpy(), expression_of(run, patches)


def test_lazyslide_writes_the_packages_own_expression_to_its_tiles(zs: ModuleType, run: Run, tmp_path: Path) -> None:
    """Two slide pixels to a region pixel, and colours whose averages of four need no rounding."""
    noise = 4 * np.random.default_rng(1).integers(0, 64, (320, 480, 3), dtype=np.uint8)
    path = write_slide(tmp_path / "slide.tif", noise)
    wsi = zs.open_wsi(path, store=None)
    zs.pp.tile_tissues(wsi, **tiling(run, pitch_um=25), tissue_key=None)
    found, expected = predicted_and_expected(zs, wsi, run, Slide(path))
    assert found.shape == (6 * 9, len(GENES))  # tiles of 64 px, every 50 px
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-5)
    assert expected.std(axis=0).min() > 0.1


def test_tiles_that_lazyslide_cut_at_another_scale_are_refused(zs: ModuleType, run: Run, tmp_path: Path) -> None:
    wsi = zs.open_wsi(write_slide(tmp_path / "slide.tif", pixels(1, 128)[0]), store=None)
    zs.pp.tile_tissues(wsi, REGION_PX, mpp=2 * SLIDE_MPP + 0.5, tissue_key=None)
    with pytest.raises(InputError, match="tiles have 1.5 um per px, the run reads 1.0"):
        TilePredictor(run, wsi.tile_spec("tiles"))


@pytest.mark.real
def test_the_tissue_of_a_real_slide_is_tiled_and_predicted(zs: ModuleType, run: Run, data_root: Path) -> None:
    path = data_root / "wsi" / "CMU-1-Small-Region.svs"
    wsi = zs.open_wsi(path, store=None)
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, **tiling(run, pitch_um=100))
    found, expected = predicted_and_expected(zs, wsi, run, Slide(path))
    assert len(found) > 50
    # Pixels are averaged with OpenCV there and with Pillow here, which may round to neighbouring grey levels.
    assert min(np.corrcoef(found[:, gene], expected[:, gene])[0, 1] for gene in range(len(GENES))) > 0.99
