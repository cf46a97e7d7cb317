"""What every rival network declares about itself, in one form."""

import dataclasses
import inspect

import pytest
from torch import nn

from hifusion.models import egn, hist2st, histogene, stnet
from hifusion.models.published import AuthorsRecipe

RIVALS = {
    "stnet": (stnet.STNet, stnet.STNetConfig, stnet.STNetOutput, stnet.RECIPE),
    "histogene": (histogene.HisToGene, histogene.HisToGeneConfig, histogene.HisToGeneOutput, histogene.RECIPE),
    "hist2st": (hist2st.Hist2ST, hist2st.Hist2STConfig, hist2st.Hist2STOutput, hist2st.RECIPE),
    "egn": (egn.EGN, egn.EGNConfig, egn.EGNOutput, egn.RECIPE),
}
rivals = pytest.mark.parametrize("module, config, output, recipe", RIVALS.values(), ids=RIVALS)


@rivals
def test_needs_are_the_keywords_of_the_forward_pass(module: type[nn.Module], config, output, recipe):
    parameters = inspect.signature(module.forward).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == ["self", "region"]
    assert tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY) == module.needs
    assert module.whole_section == ("position" in module.needs)


@rivals
def test_configuration_is_frozen_and_says_which_region_it_takes(module, config, output, recipe):
    chosen = config(n_genes=250)
    assert chosen.region_px == chosen.patch_px
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.n_genes = 3


@rivals
def test_expression_comes_first_in_the_output(module, config, output, recipe):
    assert output._fields[0] == "expression" and "embedding" in output._fields


@rivals
def test_the_authors_recipe_is_data_without_gaps(module, config, output, recipe):
    assert isinstance(recipe, AuthorsRecipe) and recipe.lr > 0 and recipe.epochs > 0
    optional = {"schedule"}
    facts = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in optional}
    assert all(value for value in facts.values() if isinstance(value, str))
