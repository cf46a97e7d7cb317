"""One file per public data layout, all under one contract:

``lacks(root) -> str``
    "" where ``root`` holds this layout, else what is missing for it, in a few words.
``names(root) -> list[str]``
    Its sections, sorted.
``read(root, sections, options) -> Iterator[AnnData]``
    Sections one by one (all where ``sections`` is None); what the files do not say is taken from ``options``.

Beside the readers stand what several of them share: ``assemble`` (the last steps of all), ``tables`` (Spatial
Transcriptomics), ``tenx`` and ``spaceranger`` (10x Genomics), ``annotated`` (AnnData), ``lattice`` (arrays and scales).
"""

from pathlib import Path
from types import ModuleType

from hifusion.errors import InputError
from hifusion.readers import (
    anndata_file,
    her2st,
    hest,
    spatialdata_store,
    st_tables,
    stnet,
    visium,
    visium_hd,
)

# The most telling layout first: a folder of single files is tried last.
READERS: dict[str, ModuleType] = {
    "visium_hd": visium_hd,
    "visium": visium,
    "hest": hest,
    "her2st": her2st,
    "stnet": stnet,
    "st_tables": st_tables,
    "spatialdata": spatialdata_store,
    "anndata": anndata_file,
}


def find_reader(root: Path, layout: str | None = None) -> ModuleType:
    """The reader whose layout ``root`` holds, or the one named by ``layout``.

    Raises
    ------
    InputError
        ``root`` is missing, the name is unknown, or the layout is not there: the message says what each reader missed.
    """
    root = Path(root)
    if not root.exists():
        raise InputError(f"{root}: no such file or folder; give raw data, or a store made by `hifusion prepare`")
    if layout is not None and layout not in READERS:
        raise InputError(f"format {layout!r} is unknown; use one of {', '.join(READERS)}")
    tried = READERS if layout is None else {layout: READERS[layout]}
    missed = {name: reader.lacks(root) for name, reader in tried.items()}
    for name, lacks in missed.items():
        if not lacks:
            return READERS[name]
    reasons = "; ".join(f"{name}: {lacks}" for name, lacks in missed.items())
    raise InputError(f"{root}: no known data layout ({reasons}); give the folder that holds these")
