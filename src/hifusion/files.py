"""Outputs that are never half written: beside first, renamed when complete."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hifusion.errors import InputError

_CHUNK = 1 << 22
_UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # not allowed
    *(errno.ENOTDIR, errno.EEXIST),  # a file stands where a folder is needed
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends well.

    Raises
    ------
    InputError
        The disk is full, or nothing may be written there. ``path`` is then what it was before.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise_if_full(error, path)
        raise
    finally:
        if path.parent.is_dir():
            part.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``, for a folder that takes its place when the block ends well.

    Whether what stands at ``path`` may be replaced, the caller has asked before.

    Raises
    ------
    InputError
        The disk is full, or nothing may be written there. ``path`` is then what it was before.
    """
    part, old = (path.with_name(f".{path.name}.{what}") for what in ("part", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for rest in (part, old):  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
        yield part
        if path.exists():
            path.rename(old)
        part.rename(path)
    except OSError as error:
        raise_if_full(error, path)
        raise
    finally:
        for rest in (part, old):
            shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def growing(path: Path, key: str, row_bytes: int, batch_rows: int) -> Iterator[tuple[BinaryIO, int]]:
    """Give a file of rows that grows beside ``path``, and how many rows of it an interrupted run left there.

    The file is opened for reading and appending. It stays when the block ends early, and is deleted when it ends well.

    Parameters
    ----------
    path
        What the rows are for.
    key
        Of everything that decides the rows: a file with another key, or cut short within a row, is not gone on with.
    batch_rows
        Only whole batches are kept, so that a run that goes on makes the very batches of one that never stopped.

    Raises
    ------
    InputError
        The disk is full, or nothing may be written there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{key[:16]}.rows")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(".*.rows"):
            if stale.name.startswith(f".{path.name}.") and stale != part:
                stale.unlink()
        done = part.stat().st_size // (row_bytes * batch_rows) * batch_rows if part.exists() else 0
        with part.open("a+b") as file:
            file.truncate(done * row_bytes)
            yield file, done
        part.unlink()
    except OSError as error:
        raise_if_full(error, path)
        raise


def raise_if_full(error: OSError, path: Path) -> None:
    """Turn "no space left", or "not allowed to write there", into one line that names what was being written."""
    if error.errno in _UNWRITABLE:
        raise InputError(
            f"{path}: cannot be written, {os.strerror(error.errno).lower()}; free some space or choose another folder, "
            "then run the same command again: what is complete is kept"
        ) from error


def write_bytes(path: Path, *pieces: bytes | memoryview) -> None:
    """Write ``pieces`` one after the other to ``path``, whole or not at all."""
    with replacing(path) as part, part.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    InputError
        The file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from error


def digest(*pieces: bytes | memoryview) -> str:
    """SHA-256 of ``pieces`` joined, as hexadecimal text."""
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    sha = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()
