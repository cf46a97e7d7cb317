"""Chosen members of an encrypted archive, zip or 7z, taken out without ever following its paths."""

import gzip
import lzma
import shutil
import stat
import struct
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from hifusion import files
from hifusion.errors import InputError

MOST_BYTES = 8 * 2**30  # of all that is taken out of one archive
_CHUNK = 1 << 20
# Copy, LZMA2, LZMA, BZip2, x86 and AES: what 7z archives are packed with by default. py7zr reads more, but that without
# a bound on memory (Zstandard: 5 GB for 60 kB) or so that damaged data ends Python (PPMd).
_7Z_METHODS = {b"\x00", b"\x21", b"\x03\x01\x01", b"\x04\x02\x02", b"\x03\x03\x01\x03", b"\x06\xf1\x07\x01"}


class _Member(NamedTuple):
    """What an archive says of a file in it: its path, the type bits of its Unix mode (0 where not said), its bytes."""

    name: str
    kind: int
    size: int


_Choose = Callable[[list[_Member]], list[_Member]]
_Streams = Generator[tuple[_Member, BinaryIO], None, None]  # each is open until the next one is asked for


def extract(archive: Path, out: Path, place: Callable[[str], str | None], password: str) -> dict[str, int]:
    """Take members out of a zip or 7z, encrypted or not; gives the size of each file written by its path in ``out``.

    Each file appears whole or not at all. Where it goes is decided by ``place`` alone, and what the archive is by its
    first bytes, not by its name.

    Parameters
    ----------
    place
        From a member's name to a path under ``out``; None leaves the member in the archive. A ``.gz`` member whose path
        does not end so is unpacked.

    Raises
    ------
    InputError
        No ``pyzipper`` or ``py7zr``, no archive, a damaged one, a wrong password, nothing to take out, or an archive
        that is out for harm: paths that lead elsewhere, links, two members for one file, more than :data:`MOST_BYTES`.
    """
    require_unpackers()
    import pyzipper

    # What pyzipper and gzip let through from damaged data, by trying thousands of it; RuntimeError is a wrong password.
    damaged = (
        *(pyzipper.BadZipFile, zlib.error, struct.error, EOFError, OSError),
        *(RuntimeError, LookupError, OverflowError, UnicodeDecodeError),
    )
    places: dict[_Member, str] = {}

    def choose(members: list[_Member]) -> list[_Member]:
        places.update(_placed(archive, members, place))
        return list(places)

    left = MOST_BYTES
    sizes = {}
    with _readable(archive, damaged), closing(_streams_of(archive)(archive, password, choose)) as streams:
        for member, source in streams:
            path = places[member]
            packed = member.name.endswith(".gz") and not path.endswith(".gz")
            read = gzip.GzipFile(fileobj=source).read if packed else source.read
            sizes[path] = _write(read, out / path, left, archive)
            left -= sizes[path]
    return sizes


def require_unpackers() -> None:
    """Refuse to go on without the modules that read encrypted archives; the error says how to install them."""
    try:
        import py7zr  # noqa: F401
        import pyzipper  # noqa: F401
    except ImportError as error:
        raise InputError("encrypted archives need py7zr and pyzipper; pip install 'hifusion[download]'") from error


def _zip_streams(archive: Path, password: str, choose: _Choose) -> _Streams:
    """The members of a zip that ``choose`` chooses, one after the other."""
    import pyzipper

    with pyzipper.AESZipFile(archive) as opened:
        infos = [info for info in opened.infolist() if not info.is_dir()]
        members = [
            _Member(info.orig_filename.replace("\\", "/"), stat.S_IFMT(info.external_attr >> 16), info.file_size)
            for info in infos
        ]
        known = dict(zip(members, infos, strict=True))
        for member in choose(members):
            with opened.open(known[member], pwd=password.encode()) as source:
                yield member, source


def _7z_streams(archive: Path, password: str, choose: _Choose) -> _Streams:
    """The members of a 7z that ``choose`` chooses, one after the other.

    All of them are first unpacked beside the archive, under numbers for names: py7zr reads its archives in one go.
    """
    import py7zr
    from py7zr.exceptions import ArchiveError

    # What py7zr lets through from a damaged archive or a wrong password, by trying thousands of them.
    damaged = (
        *(ArchiveError, lzma.LZMAError, zlib.error, struct.error, EOFError, OSError, MemoryError),
        *(LookupError, OverflowError, ValueError, TypeError, AttributeError, AssertionError),
    )
    folder = archive.absolute().with_name(f".{archive.name}.members")
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    try:
        with (
            _readable(archive, damaged),
            py7zr.SevenZipFile(archive, password=password, max_extract_size=MOST_BYTES) as opened,
        ):
            streams = opened.header.main_streams
            coders = [coder for block in streams.unpackinfo.folders for coder in block.coders] if streams else []
            if not {coder["method"] for coder in coders} <= _7Z_METHODS:
                raise InputError(f"{archive}: is packed by another method than LZMA or BZip2; unpack it with 7-Zip")
            members = [_Member(file.filename, _7z_kind(file), file.uncompressed) for file in opened.files]
            chosen = choose([member for member in members if member.kind != stat.S_IFDIR])
            names = [member.name for member in chosen]
            numbered: Any = _Numbered(folder, names)
            try:
                opened.extract(folder, names, factory=numbered)
            except py7zr.DecompressionBombError as error:
                raise _too_much(archive) from error
        for number, member in enumerate(chosen):
            with (folder / str(number)).open("rb") as source:
                yield member, source
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _7z_kind(file: Any) -> int:
    """The type bits of a 7z member's Unix mode, also where Windows wrote it; 0 for what is said to be nothing else."""
    if file.is_symlink:
        return stat.S_IFLNK
    return stat.S_IFDIR if file.is_directory else file.st_fmt or 0


class _Numbered:
    """Where py7zr writes: files of a folder, each named by the number of its member, whatever the archive calls it."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.paths = {(folder / name).as_posix(): folder / str(number) for number, name in enumerate(names)}

    def create(self, name: str) -> "_Appended":
        return _Appended(self.paths[name])


class _Appended:
    """A file that py7zr writes piece by piece; open only meanwhile, as py7zr does not close it after an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write(b"")  # an empty member is a file too

    def write(self, piece: bytes) -> int:
        try:
            with self.path.open("ab") as file:
                return file.write(piece)
        except OSError as error:
            files.raise_if_full(error, self.path)
            raise

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing is left open."""


# Told apart by their first bytes: what is said of the same archives in public differs, and a name proves nothing.
_CONTAINERS: dict[bytes, Callable[[Path, str, _Choose], _Streams]] = {
    b"PK": _zip_streams,
    b"7z\xbc\xaf\x27\x1c": _7z_streams,
}


def _streams_of(archive: Path) -> Callable[[Path, str, _Choose], _Streams]:
    with archive.open("rb") as file:
        start = file.read(6)
    for magic, streams in _CONTAINERS.items():
        if start.startswith(magic):
            return streams
    raise InputError(f"{archive}: is neither a zip nor a 7z archive (it starts with {start!r}); get it anew")


def _placed(archive: Path, members: list[_Member], place: Callable[[str], str | None]) -> list[tuple[_Member, str]]:
    """The members that are wanted and where each goes; an archive that is not what was published is refused."""
    for member in members:
        _refuse_harmful(archive, member)
    placed = [(member, path) for member in members if (path := place(member.name)) is not None]
    paths = [path for _, path in placed]
    if not placed:
        raise InputError(f"{archive}: holds none of the expected files; get it anew")
    if len(set(paths)) < len(paths):
        twice = max(paths, key=paths.count)
        raise InputError(f"{archive}: holds {twice} more than once; this is not what was published, get it anew")
    if sum(member.size for member, _ in placed) > MOST_BYTES:
        raise _too_much(archive)
    return placed


def _refuse_harmful(archive: Path, member: _Member) -> None:
    """Refuse the whole archive for a path that leads elsewhere, or a member that is no plain file."""
    path = PurePosixPath(member.name)
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in member.name:
        what = "a path that leads out of its folder"
    elif member.kind not in (0, stat.S_IFREG):
        what = "a link or device instead of a file"
    else:
        return
    raise InputError(f"{archive}: holds {what} ({member.name[:80]!r}); this is not what was published, get it anew")


def _write(read: Callable[[int], bytes], path: Path, most: int, archive: Path) -> int:
    """Write what ``read`` gives, at most ``most`` bytes, to ``path``, whole or not at all; gives its size."""
    size = 0
    with files.replacing(path) as part, part.open("wb") as file:
        while chunk := read(_CHUNK):
            size += len(chunk)
            if size > most:
                raise _too_much(archive)
            file.write(chunk)
    return size


def _too_much(archive: Path) -> InputError:
    return InputError(
        f"{archive}: unpacks to more than {MOST_BYTES >> 30} GiB; this is not what was published, get it anew"
    )


@contextmanager
def _readable(archive: Path, damaged: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what a library raises on a damaged archive or a wrong password into one line."""
    try:
        yield
    except InputError:
        raise
    except damaged as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(
            f"{archive}: cannot be unpacked, damaged or locked with another password ({reason}); get it anew"
        ) from error
