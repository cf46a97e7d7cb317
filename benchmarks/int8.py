"""What 8 bits cost: skill on a real section by a trained network, in float32, bfloat16 and 8-bit whole numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from anndata import AnnData

from benchmarks.clock import Row
from benchmarks.sections import SECTIONS, raw
from hifusion import api
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort
from hifusion.metrics import pcc_per_gene
from hifusion.prediction import predict_section

RECIPE = "quick"  # the published network learns too little in minutes for a loss of skill to be seen


def run(work: Path) -> list[Row]:
    """Train on one section, predict the other in each precision: error and mean pcc_per_gene."""
    data = raw(work)
    store = work / f"store-{RECIPE}"
    if not (store / "store.json").exists():
        api.prepare(data, store, recipe=RECIPE, sections=SECTIONS if data.name == "her2st" else None)
    cohort = Cohort.open(store, verify=False)
    first, *_, tested = list(cohort.sections)
    run_folder = work / f"run-{RECIPE}"
    trained = api.train(store, run_folder, recipe=RECIPE, sections=[first], resume=run_folder.exists())
    section = cohort.sections[tested]
    rows, exact = [], None
    for what, predict in (
        ("float32", lambda: _predicted(trained, section, "32-true")),
        ("bfloat16", lambda: _predicted(trained, section, "bf16-mixed")),
        ("int8", lambda: predict_section(trained, section, int8=True)),
    ):
        its = predict()
        target, found = np.asarray(its.layers["measured"]), np.asarray(its.X)
        skill = float(np.nanmean(pcc_per_gene(found, target)))
        exact = skill if exact is None else exact
        mse = float(np.square(found - target).mean())
        rows.append(
            Row(
                f"{tested} by a run of {first}",
                what,
                round(skill, 4),
                "pcc_per_gene",
                f"{skill - exact:+.4f}; MSE {mse:.4f}",
            )
        )
    return rows


def _predicted(trained: Run, section: AnnData, precision: str) -> AnnData:
    return predict_section(replace(trained, recipe=replace(trained.recipe, precision=precision)), section)  # type: ignore[arg-type]
