"""What networks are given beside a spot's patch: of the right shape, from the right spots, never what is tested."""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hifusion import surroundings
from hifusion.cohort import SectionView
from hifusion.configuration import Recipe
from hifusion.data import blocks, split_spots
from hifusion.encoders import Encoder
from hifusion.models import MODELS
from hifusion.models.steps import Batch
from hifusion.recipes import RIVALS, recipe_for
from hifusion.registration import positions_um
from hifusion.slide import Slide
from hifusion.surroundings import EXEMPLARS, Surroundings, predict_spots
from views import make_view

SIZE_PX = (330, 250)
SPOTS = 24
PATCH_PX = 48
ALL = np.arange(SPOTS)
SOME = np.array([7, 2, 19])
GIVEN = tuple(name for name in RIVALS if MODELS[recipe_for(name, "tiny").network].module.needs)
WHOLE = ("histogene", "hist2st", "asign2d", "asign2d_released", "asign3d")
LOOKING = (*GIVEN, "bleep")  # ST-Net's DenseNet, which sees its region alone, takes seconds to build


def recipe_of(name: str) -> Recipe:
    return replace(recipe_for(name, "tiny"), batch_size=8).sized(3)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth slide, so that windows differ by place."""
    y, x = np.mgrid[: SIZE_PX[1], : SIZE_PX[0]]
    waves = [np.sin(x / (17 + c)) + np.cos(y / (23 - c)) for c in range(3)]
    path = tmp_path_factory.mktemp("slide") / "slide.png"
    Image.fromarray((np.stack(waves, axis=-1) * 50 + 120).astype(np.uint8)).save(path)
    return path


def section(name: str, picture: Path, **changes: Any) -> SectionView:
    """A section of 24 spots, 6 in a row, with all that a store knows of it; the patient is the name's first letter."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    row, column = np.divmod(ALL, 6)
    return make_view(
        name,
        SPOTS,
        region_px=PATCH_PX,
        counts=rng.poisson(5, (SPOTS, 3)).astype(np.float32),
        array=np.stack([column + 3, row + 5], axis=1),
        image=picture,
        **changes,
    )


def blinded(view: SectionView, rows: np.ndarray = ALL) -> SectionView:
    """The section with other measurements at some spots: expression is no number there, counts are others."""
    expression, counts, total = view.expression.copy(), view.counts.copy(), view.total_counts.copy()
    expression[rows], counts[rows], total[rows] = np.nan, 7 * counts[rows] + 3, 9e5
    return replace(view, expression=expression, counts=counts, total_counts=total)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen features are numbers drawn from section and places; sections lie on each other as they are."""

    def features(
        _: Surroundings, view: SectionView, side_px: int, width: int, centres_px: np.ndarray | None = None
    ) -> Tensor:
        places = view.centres_px if centres_px is None else centres_px
        seed = zlib.crc32(f"{view.name} {side_px} {places.tolist()}".encode())
        return torch.randn(len(places), width, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(Surroundings, "features", features)
    monkeypatch.setattr(surroundings, "common_frame", lambda views: [positions_um(view) for view in views])


def network_of(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    network = MODELS[recipe.network].module(recipe.model)
    if hasattr(network, "set_bank"):
        network.set_bank(torch.randn(20, 3))
    return network.eval()


def assert_same(a: Any, b: Any) -> None:
    """Two inputs of a forward pass, by name."""
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.fixture
def fold(picture: Path) -> list[tuple[SectionView, np.ndarray]]:
    """Training spots of three sections of two patients; not all of each."""
    views = [section(name, picture) for name in ("A1", "A2", "B1")]
    return [(view, split_spots(view, 0.3, 0)[0]) for view in views]


@pytest.fixture
def tested(picture: Path) -> SectionView:
    """A further section of patient A."""
    return section("A3", picture)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", LOOKING)
def test_inputs_are_those_the_forward_pass_takes(name, fold, tested):
    recipe = recipe_of(name)
    its, network = Surroundings(recipe, fold), network_of(recipe)
    done = 0
    for region, inputs, rows in its.batches(tested, ALL):
        assert set(inputs) == set(its.needs)
        with torch.no_grad():
            assert network(region, **inputs).expression[rows].shape == (len(rows), 3)
        done += len(rows)
    assert done == SPOTS


def test_networks_without_needs_are_given_regions_alone(fold, tested):
    assert set(RIVALS) - set(GIVEN) == {"stnet", "bleep"}
    for name in ("stnet", "bleep"):
        its = Surroundings(recipe_of(name), fold)
        assert [inputs for _, inputs, _ in its.batches(tested, ALL)] == [{}] * 3


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", RIVALS)
def test_no_measurement_of_a_tested_section_is_read(name, fold, tested):
    recipe = recipe_of(name)
    seen, unseen = (list(Surroundings(recipe, fold).batches(view, ALL)) for view in (tested, blinded(tested)))
    for (region, inputs, rows), (same_region, same_inputs, same_rows) in zip(seen, unseen, strict=True):
        assert torch.equal(region, same_region) and np.array_equal(rows, same_rows)
        assert_same(inputs, same_inputs)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", LOOKING)
def test_a_prediction_is_the_same_whatever_was_measured_there(name, fold, tested):
    recipe = recipe_of(name)
    network = network_of(recipe)
    found, blind = (
        predict_spots(network, Surroundings(recipe, fold), view, ALL, "32-true") for view in (tested, blinded(tested))
    )
    np.testing.assert_array_equal(found.expression, blind.expression)
    assert np.isfinite(found.expression).all() and found.expression.shape == (SPOTS, 3)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", LOOKING)
def test_predictions_of_some_spots_are_those_of_all(name, fold, tested):
    """In the order asked for, of a tested section and of a training section whose other spots are trained on."""
    recipe = recipe_of(name)
    network, its = network_of(recipe), Surroundings(recipe, fold)
    for view in (tested, fold[0][0]):
        whole, some = (predict_spots(network, its, view, rows, "32-true") for rows in (ALL, SOME))
        np.testing.assert_allclose(some.expression, whole.expression[SOME], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(some.embedding, whole.embedding[SOME], rtol=1e-4, atol=1e-5)


def gradients(recipe: Recipe, train: list[tuple[SectionView, np.ndarray]]) -> tuple[float, list[Tensor]]:
    """Loss and gradients of all parameters, summed over an epoch."""
    network, generator = network_of(recipe).train(), torch.Generator().manual_seed(0)
    total = 0.0
    for batch in Surroundings(recipe, train).training_batches(generator):
        terms = MODELS[recipe.network].step(network, batch, **recipe.loss)
        terms["total"].backward()
        total += float(terms["total"].detach())
    return total, [its.grad for its in network.parameters() if its.grad is not None]


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", LOOKING)
def test_training_learns_from_training_spots_only(name, fold):
    hidden = [(blinded(view, np.setdiff1d(ALL, rows)), rows) for view, rows in fold]
    (loss, found), (same_loss, same) = (gradients(recipe_of(name), train) for train in (fold, hidden))
    assert np.isfinite(loss) and loss == same_loss
    assert found and all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def batches_of(name: str, fold: list[tuple[SectionView, np.ndarray]]) -> list[Batch]:
    return list(Surroundings(recipe_of(name), fold).training_batches(torch.Generator().manual_seed(0)))


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", WHOLE[:-1])
def test_a_whole_section_is_a_batch_and_its_training_spots_are_scored(name, fold):
    scored = {}
    for batch in batches_of(name, fold):
        its = next(view.name for view, _ in fold if np.array_equal(batch.target, view.expression))
        scored[its] = np.flatnonzero(batch.scored)
    assert sorted(scored) == ["A1", "A2", "B1"]
    for view, rows in fold:
        np.testing.assert_array_equal(scored[view.name], rows)


@pytest.mark.usefixtures("made_up")
def test_tile_targets_are_made_of_counts_of_training_spots(fold):
    """Log shares of the summed counts, worked out tile by tile."""
    view, rows = fold[0]
    (batch,) = batches_of("asign2d", fold[:1])
    tile = batch.beside["tile_512_index"].numpy()
    assert len(batch.beside["tile_512_target"]) > 1
    for number, target in enumerate(batch.beside["tile_512_target"]):
        chosen = [row for row in rows if tile[row] == number]
        summed = view.counts[chosen].sum(axis=0) + 1
        np.testing.assert_allclose(target, np.log(summed / summed.sum()), rtol=1e-5)


def coded(view: SectionView, number: int) -> SectionView:
    """The section with its number and each spot's row as expression, by which a target tells whose it is."""
    expression = np.stack([np.full(SPOTS, number), ALL, ALL], axis=1).astype(np.float32)
    return replace(view, expression=expression)


def exemplars_of(views: list[SectionView], asked: SectionView) -> np.ndarray:
    """(section's number, row) of the exemplars of each spot of a section, ``(24, 6, 2)``; all spots are trained on."""
    its = Surroundings(recipe_of("egn"), [(coded(view, number), ALL) for number, view in enumerate(views)])
    return its.inputs(asked, ALL)["exemplar_target"][..., :2].numpy().astype(int)


@pytest.mark.usefixtures("made_up")
def test_exemplars_of_several_patients_are_of_other_patients(picture):
    views = [section(name, picture) for name in ("A1", "A2", "B1", "C1")]
    assert set(exemplars_of(views, views[0])[..., 0].ravel()) == {2, 3}
    assert set(exemplars_of(views, views[2])[..., 0].ravel()) <= {0, 1, 3}
    assert set(exemplars_of(views, section("C2", picture))[..., 0].ravel()) <= {0, 1, 2}
    assert set(exemplars_of(views, section("D1", picture))[..., 0].ravel()) == {0, 1, 2, 3}


@pytest.mark.usefixtures("made_up")
def test_exemplars_of_one_patient_are_of_other_sections(picture):
    views = [section(name, picture) for name in ("A1", "A2", "A3")]
    assert set(exemplars_of(views, views[1])[..., 0].ravel()) == {0, 2}
    assert set(exemplars_of(views, section("A4", picture))[..., 0].ravel()) == {0, 1, 2}


@pytest.mark.usefixtures("made_up")
def test_exemplars_of_one_section_are_of_other_blocks_of_it(picture):
    """The next section of the patient may be shown all of it."""
    view = section("A1", picture)
    block = blocks(view)
    exemplars = exemplars_of([view], view)[..., 1]
    assert exemplars.shape == (SPOTS, EXEMPLARS)
    assert (block[exemplars] != block[:, None]).all()
    assert len(set(exemplars_of([view], section("A2", picture))[..., 1].ravel())) > len(np.unique(exemplars)) / 2


@pytest.mark.usefixtures("made_up")
def test_exemplars_are_training_spots(fold, tested):
    coded_fold = [(coded(view, number), rows) for number, (view, rows) in enumerate(fold)]
    its = Surroundings(recipe_of("egn"), coded_fold)
    shown = {tuple(spot) for spot in its.inputs(tested, ALL)["exemplar_target"][..., :2].reshape(-1, 2).int().tolist()}
    assert shown <= {(number, row) for number, (_, rows) in enumerate(fold) for row in rows}


@pytest.mark.usefixtures("made_up")
def test_a_tested_section_goes_behind_its_patients_training_sections_and_only_these_are_known(fold, tested):
    its = Surroundings(recipe_of("asign3d"), fold)
    ((region, inputs, rows),) = its.batches(tested, SOME)
    assert len(region) == 3 * SPOTS  # A1, A2 and the tested A3; not B1
    np.testing.assert_array_equal(rows, 2 * SPOTS + SOME)
    known = inputs["known"].numpy()
    np.testing.assert_array_equal(np.flatnonzero(known), np.concatenate([fold[0][1], SPOTS + fold[1][1]]))
    given = inputs["known_expression"].numpy()
    measured = np.concatenate([view.expression for view, _ in fold[:2]])
    np.testing.assert_array_equal(given[known], measured[known[: 2 * SPOTS]])
    assert np.isnan(given[~known]).all()


@pytest.mark.usefixtures("made_up")
def test_a_training_section_is_asked_with_its_other_spots_known(fold):
    its, (view, trained) = Surroundings(recipe_of("asign3d"), fold), fold[0]
    held_out = np.setdiff1d(ALL, trained)
    ((_, inputs, rows),) = its.batches(view, held_out)
    assert not inputs["known"][torch.from_numpy(rows)].any()
    assert int(inputs["known"].sum()) == len(trained) + len(fold[1][1])


@pytest.mark.usefixtures("made_up")
def test_whole_patients_are_batches_in_which_a_part_is_known_and_the_rest_is_learned(fold):
    batches = sorted(batches_of("asign3d", fold), key=lambda batch: -len(batch.target))
    assert [len(batch.target) for batch in batches] == [2 * SPOTS, SPOTS]
    for batch, parts in zip(batches, (fold[:2], fold[2:]), strict=True):
        trained = np.concatenate([np.isin(ALL, rows) for _, rows in parts])
        known, scored = batch.inputs["known"].numpy(), batch.scored.numpy()
        assert not (known & scored).any() and np.array_equal(known | scored, trained)
        assert 0 < known.sum() < scored.sum()
        assert torch.isnan(batch.inputs["known_expression"][~batch.inputs["known"]]).all()


@pytest.mark.usefixtures("made_up")
def test_inputs_of_triplex_by_spot_follow_the_spots_and_the_others_are_of_the_whole_section(fold, tested):
    its = Surroundings(recipe_of("triplex"), fold)
    whole, some = its.inputs(tested, ALL), its.inputs(tested, SOME)
    np.testing.assert_array_equal(some["section_row"], SOME)
    for name in ("neighbour_features", "neighbour_mask"):
        torch.testing.assert_close(some[name], whole[name][torch.from_numpy(SOME)], rtol=0, atol=0)
    for name in ("section_features", "section_cells", "section_number"):
        torch.testing.assert_close(some[name], whole[name], rtol=0, atol=0)
        assert len(some[name]) == SPOTS


def cut(view: SectionView, shrink: float = 1.0) -> SectionView:
    """The section with its regions cut from its slide, as a store has them."""
    with Slide(view.image) as slide:
        regions = [slide.read_patch(x, y, PATCH_PX, shrink)[0] for x, y in view.centres_px]
    return replace(view, regions=np.stack(regions), shrink=shrink)


def test_tiles_around_a_spot_are_row_by_row_and_the_middle_one_is_the_spots_own(picture, fold):
    """With a real encoder; the tile to the right of a spot is what the slide shows there."""
    view = cut(section("A3", picture))
    its = Surroundings(replace(recipe_of("triplex"), encoder="resnet18"), fold)
    inputs = its.inputs(view, ALL)
    around, own = inputs["neighbour_features"], inputs["section_features"]
    torch.testing.assert_close(around[:, 12], own, rtol=1e-4, atol=1e-5)
    right, below = (
        its.features(view, PATCH_PX, 32, view.centres_px + step) for step in ((PATCH_PX, 0.0), (0.0, PATCH_PX))
    )
    torch.testing.assert_close(around[:, 13], right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(around[:, 17], below, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(around[:, 12], around[:, 13], rtol=1e-2)


@pytest.mark.parametrize("name", GIVEN)
def test_with_a_real_encoder_and_registration_no_measurement_is_read_either(name, picture, fold):
    view = cut(section("A3", picture))
    recipe = replace(recipe_of(name), encoder="resnet18")
    seen, unseen = (Surroundings(recipe, fold[:2]) for _ in range(2))
    (_, inputs, _), (_, same, _) = (
        next(its.batches(given, ALL)) for its, given in ((seen, view), (unseen, blinded(view)))
    )
    assert_same(inputs, same)


def test_features_of_another_width_go_through_one_fixed_map(picture, fold):
    """Found by its effect on one section, it is that of another one, in another fold."""
    encoder = Encoder("0" * 16, "colours", 3, (), torch.device("cpu"), lambda region: region.float().mean((2, 3)))
    mapped, raw = [], []
    for name, train in (("A3", fold), ("B2", fold[:1])):
        its, view = Surroundings(recipe_of("triplex"), train), section(name, picture)
        its.__dict__["encoder"] = encoder  # a cached property
        raw.append(its.features(view, PATCH_PX, 3).double().numpy())
        mapped.append(its.features(view, PATCH_PX, 7).double().numpy())
    found = np.linalg.lstsq(raw[0], mapped[0], rcond=None)[0]
    np.testing.assert_allclose(raw[1] @ found, mapped[1], rtol=1e-3, atol=1e-2)
    assert np.linalg.matrix_rank(found) == 3


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", ["triplex", "asign2d"])
def test_a_spot_in_the_slides_last_pixels_has_its_surroundings(name, picture, fold):
    """330 px at 3.2 slide pixels a region pixel are 103 and a bit: the bit is slide too."""
    view = section("A3", picture, shrink=3.2)
    view.centres_px[-1] = (SIZE_PX[0] - 0.1, SIZE_PX[1] - 0.1)
    assert set(Surroundings(recipe_of(name), fold).inputs(view, ALL)) == set(MODELS[name].module.needs)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("name", ["asign2d", "asign3d"])
def test_the_loss_is_given_beside_the_batch_what_it_needs(name, fold):
    for batch in batches_of(name, fold):
        assert set(batch.beside) == set(MODELS[name].module.loss_needs)
