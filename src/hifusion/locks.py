"""A lock on a file that one process holds at a time and that ends with it, however it ends."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hifusion.errors import InputError, plain

if sys.platform == "win32":
    import msvcrt

    _BEYOND = 1 << 30  # Windows locks bytes and keeps others from reading them: one that is never written

    def _take(file: BinaryIO) -> bool:
        file.seek(_BEYOND)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _take(file: BinaryIO) -> bool:
        # flock, not lockf: threads of one process are told apart, and closing the file elsewhere does not give it up.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise InputError(
                f"{file.name}: cannot be locked, {plain(error.strerror)}; put the results on a file system with locks"
            ) from error
        return True


@contextmanager
def held(path: Path) -> Iterator[BinaryIO | None]:
    """Give the file at ``path``, opened for reading and appending, with its lock; None where another holds that.

    The file is made where there is none, and never deleted: a lock on a deleted file keeps nobody out. The operating
    system gives the lock up when the process ends. Between machines it holds on file systems that share locks: NFS 4,
    Lustre mounted with ``flock``, GPFS, BeeGFS with locks enabled. Tried on Linux only.

    Raises
    ------
    InputError
        The file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        yield file if _take(file) else None
