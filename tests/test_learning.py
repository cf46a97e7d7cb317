"""The whole way from raw files to scores on a patient never seen: what is planted is found, and nothing else."""

import numpy as np

from hifusion import api, recipes
from hifusion.cohort import Cohort
from hifusion.metrics import pcc_per_gene
from hifusion.prediction import predict_view
from hifusion.training import fit


def test_tiny_finds_the_planted_signal_in_a_new_patient_and_none_in_shuffled_targets(tmp_path):
    """Mean pcc_per_gene above .5 on the held-out patient D; within .1 of zero for the network on shuffled targets."""
    api.synthesise(tmp_path / "raw", patients=4, sections_per_patient=1)
    store = api.prepare(tmp_path / "raw", tmp_path / "store", recipe="tiny")
    cohort, recipe = Cohort.open(store.root), recipes.recipe("tiny")
    panel = cohort.panel(recipe.panel, recipe.panel_size, ["A1", "B1", "C1"])
    *train, tested = cohort.views(["A1", "B1", "C1", "D1"], panel, recipe.normalisation)
    skill = {}
    for null in (False, True):
        run = fit(recipe, panel, train, [], tmp_path / f"run-{null}", store=store, shuffle_targets=null)
        skill[null] = np.nan_to_num(pcc_per_gene(predict_view(run, tested), tested.expression)).mean()
    assert skill[False] > 0.5
    assert abs(skill[True]) < 0.1
