"""The verb `view`: sections shown by a local server, or copied with their page into a folder."""

import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from hifusion import files
from hifusion.errors import InputError
from hifusion.viewer.pages import Site, assets

Progress = Callable[[str, int, int], None]  # (what is going on, done, in all)
MOST_COPIED_PX = 2**15  # longest side of a slide in a copy: about 4,000 tiles, 200 MB


def view(
    sources: Path | Sequence[Path],
    *,
    export: Path | None = None,
    genes: Sequence[str] | None = None,
    port: int = 0,
    open_browser: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Path | None:
    """Show sections on a local page until Ctrl-C; or write the page into a folder, which is then returned.

    Parameters
    ----------
    sources
        Section files (.h5ad), measured or predicted, and folders that hold them; what is of the same section and the
        same spots comes together. See :func:`hifusion.viewer.gathering.gather`.
    export
        A folder to write instead, for any web server. It must not hold anything else.
    genes
        The only genes to show; all where None.
    port
        On 127.0.0.1; any free one where 0.
    say
        Told the address, which holds a token without which nothing is answered.

    Raises
    ------
    InputError
        Nothing to show, a gene that is nowhere, a port or folder that cannot be used, or the extra is not installed.
    """
    sources = [Path(sources)] if isinstance(sources, str | Path) else sources
    if export is not None:
        return write_copy(Site(sources, genes, MOST_COPIED_PX), Path(export), progress)
    try:
        from hifusion.viewer import server
    except ImportError as error:
        raise InputError(
            "the viewer needs fastapi and uvicorn; pip install 'hifusion[viewer]' (`--export` works without)"
        ) from error
    site = Site(sources, genes)
    site.warm()

    def told(address: str) -> None:
        say(address)
        if open_browser:
            webbrowser.open(address)

    server.serve(site, port, told)
    return None


def write_copy(site: Site, folder: Path, progress: Progress | None = None) -> Path:
    """Write every file of the page into a folder, whole or not at all; an earlier copy there is replaced."""
    if folder.is_file() or (folder.is_dir() and not is_copy(folder)):
        raise InputError(f"{folder}: holds something else; give a new folder, or the one of an earlier copy")
    count = site.count()
    with files.replacing_folder(folder) as part:
        for done, (address, content) in enumerate(site.files(), 1):
            path = part / address
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            if progress:
                progress("files", done, count)
    return folder


def is_copy(folder: Path) -> bool:
    """Whether a folder holds a copy of the page and nothing of anybody else, or nothing at all."""
    return {path.name for path in folder.iterdir()} <= {*assets(), "data"}
