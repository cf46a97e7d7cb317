"""One file per public data layout, each with ``recognises(root)``, ``names(root)`` and ``read(root, sections)``."""

from pathlib import Path
from types import ModuleType

from hifusion.errors import InputError
from hifusion.readers import her2st

READERS: dict[str, ModuleType] = {"her2st": her2st}


def find_reader(root: Path) -> ModuleType:
    """The reader whose layout ``root`` holds.

    Raises
    ------
    InputError
        The folder is missing, or no reader recognises it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a raw data folder or a store made by `hifusion prepare`")
    for reader in READERS.values():
        if reader.recognises(root):
            return reader
    raise InputError(f"{root}: no known data layout ({', '.join(READERS)}: needs data/ST-cnts and data/ST-spotfiles)")
