"""What files and folders hold for the page: each section once, with what was measured and what models predict."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from anndata import AnnData

from hifusion import files
from hifusion.errors import InputError, plain
from hifusion.evaluated import choose_models, find_predictions, natural, rank
from hifusion.section import read_section

_STORE = "store.json"


@dataclass
class Gathered:
    """One section, and every file of it whose spots are the same.

    Attributes
    ----------
    measured
        The section with its counts, None where only predictions were given.
    predictions
        Label of the model -> its prediction, floor first.
    """

    name: str
    measured: AnnData | None = None
    predictions: dict[str, AnnData] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)  # label ("" of the measured one) -> file, for messages

    @property
    def spots(self) -> AnnData:
        """The file that spots, positions and picture are taken from."""
        return self.measured if self.measured is not None else next(iter(self.predictions.values()))


def gather(sources: Sequence[Path]) -> list[Gathered]:
    """The sections of files and folders, by name.

    Files come together where their section has the same name and the same spots. A section that was predicted on
    another lattice is a section of its own.

    Parameters
    ----------
    sources
        Section files (.h5ad), measured or predicted; folders of a predicted slide, of an archive of them, of an
        evaluation or a benchmark, of a patch store.

    Raises
    ------
    InputError
        A path holds no section, or two files are of the same section and model.
    """
    found: dict[tuple[str, str], Gathered] = {}
    for source in sources:
        for path, label in _section_files(Path(source)):
            section = read_section(path)
            name, run = (str(section.uns["hifusion"][fact]) for fact in ("section", "run"))
            its = found.setdefault((name, _spots_digest(section)), Gathered(name))
            label = "" if not run else label or run
            if label in its.paths:
                what = f"model {plain(label)}" if label else "measurement"
                raise InputError(f"{path}: the same section and {what} as {its.paths[label]}; give one of them")
            its.paths[label] = path
            if label:
                its.predictions[label] = section
            else:
                its.measured = section
    for its in found.values():
        its.predictions = {label: its.predictions[label] for label in sorted(its.predictions, key=rank)}
    return sorted(found.values(), key=lambda its: natural(its.name))


def _section_files(source: Path) -> Iterator[tuple[Path, str]]:
    """Section files of what was given, each with the label that its folder gives its model, "" where none does."""
    if source.is_file():
        yield source, ""
        return
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder; give a section (.h5ad) or a folder of predictions")
    if (source / "predictions").is_dir():
        predictions = find_predictions(source)
        # An evaluation says which of its models look at the answer; nothing else has predictions to leave out.
        told = source if (source / "metrics.json").is_file() else None
        shown = choose_models(sorted({label for _, label in predictions}, key=rank), None, told)
        yield from ((path, label) for (_, label), path in predictions.items() if label in shown)
        return
    inside = [source / "section.h5ad"] if (source / "section.h5ad").is_file() else sorted(source.glob("*/section.h5ad"))
    if (source / _STORE).is_file():
        inside = sorted(source.glob("sections/*.h5ad"))
    if not inside:
        raise InputError(
            f"{source}: holds no section; give section files (.h5ad), what `hifusion predict` wrote for a slide, or an "
            "evaluation, a benchmark or a patch store"
        )
    yield from ((path, "") for path in inside)


def _spots_digest(section: AnnData) -> str:
    names = "\n".join(map(str, section.obs_names)).encode()
    return files.digest(names, np.round(np.asarray(section.obsm["spatial"], dtype=np.float64), 2).tobytes())
