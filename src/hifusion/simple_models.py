"""The table of nulls and simple rivals: those on arrays, and those that want an encoder or a registration."""

import importlib.util
from functools import partial
from typing import NamedTuple

from hifusion.baselines import BASELINES, Baseline
from hifusion.features_ridge import fit_features_ridge
from hifusion.neighbour_section import fit_neighbour_section


class Rival(NamedTuple):
    """A simple rival, and the package that an extra installs for it."""

    baseline: Baseline
    package: str = ""
    extra: str = ""

    @property
    def lacks(self) -> str:
        """What to do where the package is not installed; empty where it is, or none is needed."""
        missing = self.package and importlib.util.find_spec(self.package) is None
        return f"`pip install 'hifusion[{self.extra}]'` installs what it needs" if missing else ""


def simple_models(encoder: str) -> dict[str, Rival]:
    """Nulls and simple rivals by name; ``encoder`` is that of ``features_ridge``."""
    return {name: Rival(baseline) for name, baseline in BASELINES.items()} | {
        "features_ridge": Rival(
            Baseline(
                partial(fit_features_ridge, encoder=encoder),
                True,
                False,
                f"ridge regression on features of a frozen encoder ({encoder})",
            ),
        ),
        "neighbour_section": Rival(
            Baseline(fit_neighbour_section, True, False, "expression of the patient's measured sections, laid over"),
            "SimpleITK",
            "registration",
        ),
    }


SIMPLE = tuple(simple_models(""))
