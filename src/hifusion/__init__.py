"""Spatial gene expression from H&E slides: prepare, train, evaluate, predict, look.

The verbs of the command line are functions here. They are imported when first asked for, so `import hifusion` is
instant and does not import torch: `download`, `import_sections`, `synthesise`, `prepare`, `train`, `adapt`, `evaluate`,
`benchmark`, `plan`, `predict`, `plan_archive`, `predict_archive`, `export`, `plot`, `draw`, `map_gene`, `register`,
`label_report`, `report`, `view`, `reproduce`, `info`, `doctor`.
"""

from importlib import import_module
from typing import Any

from hifusion.errors import InputError

__version__ = "0.1.0"

_VERBS = (
    *("BenchmarkSettings", "adapt", "benchmark", "doctor", "download", "draw", "estimate", "evaluate", "export"),
    *(
        "import_sections",
        "info",
        "label_report",
        "map_gene",
        "plan",
        "plan_archive",
        "plot",
        "predict",
        "predict_archive",
        "prepare",
        "register",
        "report",
        "synthesise",
        "train",
        "view",
    ),
)

__all__ = ["InputError", "__version__", *_VERBS]


def __getattr__(name: str) -> Any:
    """The verb of that name, imported now."""
    if name not in _VERBS:
        raise AttributeError(f"module 'hifusion' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module("hifusion.api"), name)


def __dir__() -> list[str]:
    """All that the package offers, the verbs not yet imported included."""
    return sorted({*globals(), *_VERBS})
