"""Chosen members of an encrypted zip archive, taken out without ever following its paths."""

import gzip
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from hifusion import files
from hifusion.errors import InputError

MOST_BYTES = 8 * 2**30  # of all that is taken out of one archive
_CHUNK = 1 << 20


def extract(archive: Path, out: Path, place: Callable[[str], str | None], password: str) -> dict[str, int]:
    """Take members out of a zip, AES-encrypted or not; gives the size of each file written, by its path under ``out``.

    Each file appears whole or not at all. Where it goes is decided by ``place`` alone.

    Parameters
    ----------
    place
        From a member's name to a path under ``out``; None leaves the member in the archive. A ``.gz`` member whose path
        does not end so is unpacked.

    Raises
    ------
    InputError
        No ``pyzipper``, a damaged archive, a wrong password, nothing to take out, or an archive that is out for harm:
        paths that lead elsewhere, links, two members for one file, more than :data:`MOST_BYTES`.
    """
    pyzipper = require_pyzipper()
    # What pyzipper lets through from a damaged archive, by trying thousands of them; RuntimeError is a wrong password.
    damaged = (
        *(pyzipper.BadZipFile, zlib.error, struct.error, EOFError, OSError),
        *(RuntimeError, LookupError, OverflowError, UnicodeDecodeError),
    )
    with _readable(archive, damaged), pyzipper.AESZipFile(archive) as zip_file:
        members = [member for member in zip_file.infolist() if not member.is_dir()]
        for member in members:
            _refuse_harmful(archive, member)
        placed = [(member, path) for member in members if (path := place(member.filename)) is not None]
        paths = [path for _, path in placed]
        if not placed:
            raise InputError(f"{archive}: holds none of the expected files; get it anew")
        if len(set(paths)) < len(paths):
            twice = max(paths, key=paths.count)
            raise InputError(f"{archive}: holds {twice} more than once; this is not what was published, get it anew")
        left = MOST_BYTES
        sizes = {}
        for member, path in placed:
            with zip_file.open(member, pwd=password.encode()) as source:
                packed = member.filename.endswith(".gz") and not path.endswith(".gz")
                read = gzip.GzipFile(fileobj=source).read if packed else source.read
                sizes[path] = _write(read, out / path, left, archive)
            left -= sizes[path]
        return sizes


def require_pyzipper() -> Any:
    """The module that reads AES-encrypted zips, or one line that says how to install it."""
    try:
        import pyzipper  # type: ignore
    except ImportError as error:
        raise InputError("encrypted archives need pyzipper; pip install 'hifusion[download]'") from error
    return pyzipper


def _refuse_harmful(archive: Path, member: Any) -> None:
    """Refuse the whole archive for a path that leads elsewhere, or a member that is no plain file."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or "\0" in member.orig_filename:
        what = "a path that leads out of its folder"
    elif kind not in (0, stat.S_IFREG):
        what = "a link or device instead of a file"
    else:
        return
    raise InputError(f"{archive}: holds {what} ({name[:80]!r}); this is not what was published, get it anew")


def _write(read: Callable[[int], bytes], path: Path, most: int, archive: Path) -> int:
    """Write what ``read`` gives, at most ``most`` bytes, to ``path``, whole or not at all; gives its size."""
    size = 0
    with files.replacing(path) as part, part.open("wb") as file:
        while chunk := read(_CHUNK):
            size += len(chunk)
            if size > most:
                raise InputError(
                    f"{archive}: unpacks to more than {MOST_BYTES >> 30} GiB; this is not what was published"
                )
            file.write(chunk)
    return size


@contextmanager
def _readable(archive: Path, damaged: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what pyzipper raises on a damaged archive or a wrong password into one line."""
    try:
        yield
    except damaged as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{archive}: cannot be unpacked ({reason}); get it anew") from error
