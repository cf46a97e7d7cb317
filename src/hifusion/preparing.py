"""Raw data in any known layout into a patch store, each section checked against its slide."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from anndata import AnnData

from hifusion import guard, recipes, store
from hifusion.errors import InputError
from hifusion.readers import find_reader
from hifusion.slide import Slide
from hifusion.store import Progress, Store


def prepare(
    data: Path,
    out: Path,
    *,
    recipe: str = "recommended",
    sections: Sequence[str] | None = None,
    region_px: int | None = None,
    mpp: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Build the patch store of a raw data folder, or finish an interrupted one.

    Parameters
    ----------
    data
        Raw folder in a layout of ``hifusion.readers``.
    recipe
        The patches are of the size and scale its network takes; ``region_px`` and ``mpp`` change single values.
    sections
        Names; all where None.
    force
        Go on where positions and slide do not seem to belong together (:mod:`hifusion.guard`).
    """
    data, wanted = Path(data), recipes.recipe(recipe)
    reader = find_reader(data)
    known = reader.names(data)
    unknown = [name for name in sections or () if name not in known]
    if unknown:
        raise InputError(f"{data}: has no section {', '.join(unknown)}; it has {', '.join(known)}")
    return store.prepare(
        _guarded(reader.read(data, sections), Path(out), force),
        Path(out),
        region_px=region_px or wanted.model.region_px,
        mpp=mpp or wanted.region_mpp,
        progress=progress,
    )


def _guarded(sections: Iterable[AnnData], out: Path, force: bool) -> Iterator[AnnData]:
    """The sections, each checked against its slide; one that does not fit leaves a picture in the store's folder."""
    for section in sections:
        facts = section.uns["hifusion"]
        if facts["image"]:
            picture = out / "checks" / f"{facts['section']}.png"
            guard.require_geometry(section, Slide(Path(facts["image"])), force=force, picture=picture)
        yield section
