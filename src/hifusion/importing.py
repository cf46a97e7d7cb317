"""Raw data in any layout of ``hifusion.readers``, written as one ``.h5ad`` for each section."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hifusion.errors import InputError
from hifusion.readers import find_reader
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.section import read_section, refuse_unsafe_name, write_section

Progress = Callable[[str, int, int], None]  # (section, sections done, sections in all)


def import_sections(
    source: Path,
    out: Path,
    *,
    layout: str | None = None,
    sections: Sequence[str] | None = None,
    options: ReadOptions = NOTHING_TOLD,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the sections of a raw folder or file as ``<out>/<section>.h5ad``, each whole or not at all.

    A section that an import wrote before is replaced; any other file of that name is left alone.

    Parameters
    ----------
    source
        Raw data in a layout of :data:`hifusion.readers.READERS`.
    layout
        One of its names; found out where None.
    sections
        Names; all where None.
    options
        What the files leave open.

    Returns
    -------
    list[Path]
        The files written, in the order of the sections.

    Raises
    ------
    InputError
        No known layout, an unknown section, a name that is no file name, a file of another making in the way, or a
        section that cannot be read (those before it are kept).
    """
    source, out = Path(source), Path(out)
    reader = find_reader(source, layout)
    known = reader.names(source)
    named = {"sections": sections or (), "images": options.images, "patients": options.patients}
    for what, given in named.items():
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"{source}: {what} name {', '.join(unknown)}, but its sections are {', '.join(known)}")
    wanted = list(known if sections is None else sections)
    for name in wanted:
        refuse_unsafe_name(name, str(source))
    paths = {name: out / f"{name}.h5ad" for name in wanted}
    for path in paths.values():
        _refuse_foreign(path, source)
    written = []
    for section in reader.read(source, wanted, options):
        path = paths[section.uns["hifusion"]["section"]]
        write_section(section, path)
        written.append(path)
        if progress:
            progress(path.stem, len(written), len(wanted))
    return written


def _refuse_foreign(path: Path, source: Path) -> None:
    """Only what an import wrote is replaced: not the source itself, not a prediction, not somebody's own file."""
    if not path.exists():
        return
    if path.resolve() == source.resolve() or path.resolve().parent == source.resolve():
        raise InputError(f"{path}: is the source itself, which is never overwritten; give another folder")
    try:
        run = read_section(path).uns["hifusion"]["run"]
    except InputError as error:
        raise InputError(f"{path}: stands there and is no section that hifusion wrote; give another folder") from error
    if run:
        raise InputError(f"{path}: stands there and is a prediction by {run}; give another folder")
