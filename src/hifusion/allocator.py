"""Memory that this process has freed is kept by it for its next step."""

import ctypes
import sys

# Numbers of malloc.h: how much free memory at its end the heap keeps, and how many blocks may lie outside of it.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the rest of this process; nothing happens where another library allocates.

    The maps of a training step are taken and given back at every step. By default glibc returns blocks above 32 MB to
    the system each time, which then has to clear them page by page when they are taken again: an eighth of a step on a
    CPU at 8 spots (`make bench`), more at 32. The most that a process holds does not grow by it, but it is held until
    the process ends.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl, for one, has none
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_MMAP_MAX, 0)
