"""What every network declares about itself, in one form: what the training loop and the surroundings go by."""

import dataclasses
import importlib
import inspect
import typing

import pytest

from hifusion.models import MODELS, Model
from hifusion.models.published import AuthorsRecipe
from hifusion.models.steps import Batch

networks = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
rivals = pytest.mark.parametrize("name", [name for name in MODELS if name not in ("hifusion", "hifusion_frozen")])
IN_TRAINING = {"measured"}  # BLEEP's: the target itself, given by its training step


def keywords(function: typing.Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [its.name for its in parameters if its.kind is its.KEYWORD_ONLY]


@networks
def test_needs_are_the_keywords_of_the_forward_pass(model: Model):
    forward = model.module.forward
    parameters = inspect.signature(forward).parameters.values()
    assert [its.name for its in parameters if its.kind is its.POSITIONAL_OR_KEYWORD] == ["self", "region"]
    assert set(keywords(forward)) - IN_TRAINING == set(model.module.needs)


@networks
def test_a_network_says_whether_it_takes_whole_sections(model: Model):
    by_place = {"position", "spot_graph"} & set(model.module.needs)
    assert model.module.whole_section == bool(by_place)
    assert getattr(model.module, "whole_patient", False) == ("known" in model.module.needs)


@networks
def test_configuration_is_frozen_and_says_which_region_it_takes(model: Model):
    chosen = model.config(n_genes=250)
    assert chosen.region_px >= 112 and chosen.region_px % 2 == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.n_genes = 3


@networks
def test_expression_comes_first_in_the_output_and_an_embedding_is_there(model: Model):
    output = typing.get_type_hints(model.module.forward)["return"]
    assert output._fields[0] == "expression" and "embedding" in output._fields


@networks
def test_a_step_takes_a_batch_and_has_defaults_for_its_options(model: Model):
    parameters = list(inspect.signature(model.step).parameters.values())
    assert [its.name for its in parameters[:2]] == ["network", "batch"] and parameters[1].annotation is Batch
    assert all(its.kind is its.KEYWORD_ONLY and its.default >= 0 for its in parameters[2:])


@rivals
def test_the_authors_recipe_is_data_without_gaps(name: str):
    module = importlib.import_module("hifusion.models." + {"asign2d": "asign"}.get(name, name))
    recipe = module.RECIPE
    assert isinstance(recipe, AuthorsRecipe) and recipe.lr > 0 and recipe.epochs > 0
    optional = {"schedule"}
    facts = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in optional}
    assert all(value for value in facts.values() if isinstance(value, str))
