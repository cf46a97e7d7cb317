"""Named configurations: that each is usable, what the published ones hold, and overrides."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from hifusion.configuration import Recipe, from_dict
from hifusion.errors import InputError
from hifusion.models import MODELS, asign, asign3d, bleep, egn, hist2st, histogene, stnet, triplex
from hifusion.recipes import RECIPES, RIVALS, recipe, recipe_for, recipes_for

PRESETS = ("quick", "tiny")
PUBLISHED = ("her2st_2d", "her2st_3d", "stdata_2d", "stdata_3d")


def flat(given: Recipe) -> dict[str, object]:
    values = asdict(given)
    return values | {f"{group}.{key}": value for group in ("model", "loss") for key, value in values.pop(group).items()}


def differences(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    return {key: (value, flat(b)[key]) for key, value in flat(a).items() if value != flat(b)[key]}


def test_the_recipes_that_are_promised_are_there() -> None:
    expected = {(name, source) for name in PUBLISHED for source in ("paper", "code")}
    reduced = {(f"{name}{preset}", "hifusion") for name in ("", *(f"{its}_" for its in RIVALS)) for preset in PRESETS}
    own = {("recommended", "hifusion")}
    assert set(RECIPES) == expected | {(name, "code") for name in RIVALS} | reduced | own


@pytest.mark.parametrize("key", RECIPES, ids="-".join)
def test_a_recipe_carries_its_name_and_makes_a_network(key: tuple[str, str]) -> None:
    found = recipe(*key)
    assert (found.name, found.source) == key
    assert found.model.n_genes == found.panel_size
    with torch.device("meta"):
        network = MODELS[found.network].module(found.model)
    assert network.config.n_genes == found.panel_size
    assert not found.start_at_mean or hasattr(network, "start_at")


@pytest.mark.parametrize("key", RECIPES, ids="-".join)
def test_a_recipe_survives_plain_values_and_json(key: tuple[str, str]) -> None:
    found = RECIPES[key]
    assert from_dict(asdict(found)) == found
    again = from_dict(json.loads(json.dumps(asdict(found))))
    assert again == found
    assert type(again.model) is MODELS[found.network].config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_are_those_of_the_paper(name: str) -> None:
    """The network, the panel and the training schedule, as the paper gives them."""
    found, network = recipe(name), recipe(name).model
    assert (network.grids, network.spot_px, network.region_px, network.width) == ((1, 2, 7), 224, 448, 64)
    assert (network.heads, network.dropout) == (8, 0.1)
    assert (network.spot_encoder, network.region_encoder) == ("resnet18", "resnet10")
    assert (found.panel, found.panel_size, found.normalisation) == ("paper", 250, "log_share")
    assert (found.epochs, found.batch_size, found.batches, found.augment) == (50, 32, "section", True)
    assert (found.lr, found.min_lr, found.weight_decay) == (3e-4, 1e-6, 1e-5)
    assert (found.loss, network.level_resize, found.region_mpp) == ({"align_weight": 1.0}, "bilinear", None)
    assert found.source == "paper"


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_and_code_differ_exactly_where_text_and_code_do(name: str) -> None:
    expected = {
        "source": ("paper", "code"),
        "model.level_resize": ("bilinear", "max"),
        "loss.align_weight": (1.0, 0.5),
    }
    if name.startswith("her2st"):
        expected["lr"] = (3e-4, 1e-3)
    assert differences(recipe(name, "paper"), recipe(name, "code")) == expected


@pytest.mark.parametrize(
    "override, expected",
    [
        ("epochs=5", {"epochs": (50, 5)}),
        ("model.grids=[1,2]", {"model.grids": ((1, 2, 7), (1, 2))}),
        ("lr=1e-3", {"lr": (3e-4, 1e-3)}),
        ("lr=.001", {"lr": (3e-4, 1e-3)}),
        ("region_mpp=0.5", {"region_mpp": (None, 0.5)}),
        ("augment=false", {"augment": (True, False)}),
        ("panel=genes.txt", {"panel": ("paper", "genes.txt")}),
        ("precision=32-true", {"precision": ("auto", "32-true")}),
        (" model.level_resize = max ", {"model.level_resize": ("bilinear", "max")}),
    ],
)
def test_an_override_changes_that_one_value(override: str, expected: dict[str, tuple[object, object]]) -> None:
    base = recipe("her2st_3d")
    assert differences(base, recipe("her2st_3d", overrides=[override])) == expected


@pytest.mark.parametrize("word", ["none", "None", "null", "native"])
def test_no_scale_means_native_pixels(word: str) -> None:
    assert recipe("quick").region_mpp is not None
    assert recipe("quick", overrides=[f"region_mpp={word}"]).region_mpp is None


def test_the_last_of_two_overrides_stands_and_the_recipe_itself_stays() -> None:
    assert recipe("tiny", overrides=["epochs=5", "epochs=7"]).epochs == 7
    assert recipe("tiny") == RECIPES["tiny", "hifusion"]


@pytest.mark.parametrize(
    "override, words",
    [
        ("epoch=5", "--set epoch is unknown; did you mean 'epochs'?"),
        ("model.grid=[1]", "--set model.grid is unknown; did you mean 'model.grids'?"),
        ("name=mine", "--set name is unknown"),
        ("model=small", "--set model is unknown"),
        ("model.n_genes=5", "set panel_size or panel"),
        ("epochs", "--set 'epochs' is not key=value"),
        ("epochs=many", "recipe value epochs='many' is not possible"),
        ("epochs=2.5", "recipe value epochs=2.5 is not possible"),
        ("epochs=", "recipe value epochs='' is not possible"),
        ("epochs=-1", "epochs=-1 is not possible; use at least 0"),
        ("batch_size=1", "batch_size=1 is not possible; use at least 2"),
        ("panel_size=0", "panel_size=0"),
        ("lr=0", "lr=0.0 is not possible; use a number above 0"),
        ("lr=nan", "lr=nan"),
        ("lr=Infinity", "lr=inf"),
        ("region_mpp=-1", "region_mpp=-1.0"),
        ("min_lr=-1", "min_lr=-1.0 is not possible; use 0 or"),
        ("weight_decay=-1", "weight_decay=-1.0"),
        ("loss.align_weight=nan", "loss.align_weight=nan is not possible; use 0 or"),
        ("loss.align=1", "--set loss.align is unknown; did you mean 'loss.align_weight'?"),
        ("network=stnet", "--set network is unknown"),
        ("validation_fraction=1", "validation_fraction=1.0"),
        ("batches=all", "'section' or 'mixed'"),
        ("normalisation=cpm", "'log_share' or 'log1p_cpm'"),
        ("precision=16", "recipe value precision=16 is not possible"),
        ("panel=5", "recipe value panel=5 is not possible"),
        ("augment=perhaps", "recipe value augment='perhaps'"),
        ("model.grids=[1,5]", "grids: 5 does not divide spot_px=224"),
        ("model.grids=7", "recipe value model.grids=7"),
        ("model.width=wide", "recipe value model.width='wide'"),
        ("model.spot_encoder=vit", "spot_encoder: 'vit' is unknown"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe("her2st_2d", overrides=[override])
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name, source, words",
    [
        ("tyni", None, "recipe 'tyni' is unknown; did you mean 'tiny'?"),
        ("xxxx", None, "recipe 'xxxx' is unknown; use one of her2st_2d, "),
        ("her2st_2d", "hifusion", "recipe her2st_2d has no source 'hifusion'; it has paper, code"),
        ("tiny", "paper", "recipe tiny has no source 'paper'; it has hifusion"),
    ],
)
def test_an_unknown_recipe_or_source_is_one_line(name: str, source: str | None, words: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe(name, source)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_values_are_checked_however_a_recipe_is_made() -> None:
    with pytest.raises(InputError, match="epochs=-1"):
        replace(recipe("tiny"), epochs=-1)
    with pytest.raises(InputError, match="epochs=-1"):
        from_dict(asdict(recipe("tiny")) | {"epochs": -1})


def test_plain_values_that_lack_one_are_refused() -> None:
    values = asdict(recipe("tiny"))
    del values["model"]["n_genes"]
    with pytest.raises(InputError, match="model.n_genes"):
        from_dict(values)


AUTHORS = {
    "stnet": stnet.RECIPE,
    "histogene": histogene.RECIPE,
    "hist2st": hist2st.RECIPE,
    "egn": egn.RECIPE,
    "triplex": triplex.RECIPE,
    "asign2d": asign.RECIPE,
    "asign2d_released": asign.RECIPE,
    "asign3d": asign3d.RECIPE,
    "bleep": bleep.RECIPE,
}


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_is_trained_as_its_authors_say(name: str) -> None:
    """Rate, decay, momentum, optimiser and epochs, but for two that the recipe explains."""
    found, facts = recipe(name), AUTHORS[name]
    assert (found.optimiser, found.weight_decay) == (facts.optimiser.lower(), facts.weight_decay)
    assert found.lr == pytest.approx(facts.lr * (32 if name == "stnet" else 1))
    assert found.optimiser != "sgd" or found.momentum == facts.momentum
    assert found.epochs == (100 if name == "triplex" else facts.epochs)


def test_rivals_take_what_a_store_made_for_the_preset_holds() -> None:
    for preset in (*PRESETS, "her2st_2d"):
        own = recipe(preset)
        for name in RIVALS:
            rival = recipe_for(name, preset)
            room = own.model.region_px - rival.model.region_px
            assert rival.region_mpp == own.region_mpp and room >= 0 and room % 2 == 0


def test_a_reduced_rival_is_a_smaller_one_of_the_same_network() -> None:
    for name in RIVALS:
        for preset in PRESETS:
            reduced, full = recipe_for(name, preset), recipe_for(name, "her2st_2d")
            assert (reduced.name, full.name) == (f"{name}_{preset}", name)
            assert reduced.network == full.network and reduced.model != full.model


def test_an_override_can_be_for_one_model() -> None:
    given = ["stnet:epochs=3", "lr=0.5"]
    assert (recipe_for("stnet", "quick", overrides=given).epochs, recipe_for("egn", "quick").epochs) == (3, 20)
    assert {recipe_for(name, "quick", overrides=given).lr for name in ("stnet", "egn", "hifusion")} == {0.5}
    with pytest.raises(InputError, match="model 'stnett' is not in"):
        recipes_for(["stnet", "ridge"], "quick", overrides=["stnett:epochs=3"])


def test_options_of_a_loss_are_those_of_its_network() -> None:
    assert recipe("hist2st", overrides=["loss.views=2"]).loss == {"views": 2}
    with pytest.raises(InputError, match="loss.views"):
        recipe("histogene", overrides=["loss.views=2"])
    with pytest.raises(InputError, match="loss.align_weight is unknown to stnet; use none"):
        from_dict(asdict(recipe("stnet")) | {"loss": {"align_weight": 1.0}})
