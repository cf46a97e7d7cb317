"""Processes and threads that share a machine: what each has of cores and GPUs, and how they end with their starter."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")

WATCH = "HIFUSION_ENDS_WITH_STDIN"  # set for processes that end when whoever started them does


def cores() -> int:
    """Cores that this process may use."""
    # Containers and schedulers give a part of the machine; not told on macOS and Windows.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """GPUs that CUDA sees."""
    return torch.cuda.device_count()


def threads_each(processes: int) -> int:
    """Threads that each of so many processes has for itself."""
    return max(1, cores() // processes)


@contextmanager
def so_many_threads(threads: int) -> Iterator[None]:
    """Networks of this process have so many threads while the block lasts, as those of a worker would."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(do: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """What ``do`` makes of each item, in their order, by so many threads at a time.

    Each runs its networks on a core of its own: two that see a batch each are half as fast again as one that shares
    every layer out to two cores.
    """
    with so_many_threads(1), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(do, items)


def shared_environment(processes: int, slot: int) -> dict[str, str]:
    """Environment of one of so many processes, the ``slot``-th: its threads, and a GPU in turn where there are several.

    Started with a pipe as its standard input, the process can end with its starter by :func:`end_with_starter`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_each(processes)), WATCH: "1"}
    if processes > 1:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads would take the others' cores
    if (there := gpus()) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % there)
    return environment


def end_with_starter() -> None:
    """End this process when its standard input is closed, as it is when the process that started it is gone.

    Nothing happens in a process that was not started with :func:`shared_environment`.
    """
    if not os.environ.get(WATCH):
        return

    def watch() -> None:
        # Not through sys.stdin: a thread that waits in it holds its lock, without which the interpreter cannot end.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
