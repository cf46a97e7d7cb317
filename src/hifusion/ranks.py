"""The processes that train one network together: which one this is, and which spots of a batch are its own."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from hifusion.errors import InputError

LEAST = 2  # spots a rank learns from at a time: batch norm cannot learn from one


class Share(NamedTuple):
    """One of the processes that train together."""

    rank: int = 0
    ranks: int = 1

    def rows(self, spots: int) -> slice:
        """The rows of a batch of so many spots that are this rank's own.

        A batch too small to be shared out goes whole through every rank, so that none stands aside: they then agree on
        its gradient instead of adding it up.
        """
        if spots < LEAST * self.ranks:
            return slice(0, spots)
        return slice(self.rank * spots // self.ranks, (self.rank + 1) * spots // self.ranks)

    def weight(self, spots: int) -> float:
        """What a mean over this rank's own rows counts in the mean over the batch; 1 over all ranks."""
        if spots < LEAST * self.ranks:
            return 1 / self.ranks
        own = self.rows(spots)
        return (own.stop - own.start) / spots


ALONE = Share()


class Launched(NamedTuple):
    """What torchrun or srun has started."""

    by: str
    devices: int
    """Processes on each node."""
    nodes: int


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """How many processes torchrun or srun has started together with this one; None where neither did."""
    if "TORCHELASTIC_RUN_ID" in environment:
        here, everywhere = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
        return Launched("torchrun", here, everywhere // here)
    # Of the step, not of the job: within a job of many tasks a command without srun is one process.
    if "SLURM_STEP_NUM_TASKS" in environment and int(environment["SLURM_STEP_NUM_TASKS"]) > 1:
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        return Launched("srun", int(environment["SLURM_STEP_NUM_TASKS"]) // nodes, nodes)
    return None


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that writes and prints."""
    started = launched(environment)
    if started is not None:
        return environment["RANK" if started.by == "torchrun" else "SLURM_PROCID"] == "0"
    return int(environment.get("NODE_RANK", "0")) == int(environment.get("LOCAL_RANK", "0")) == 0


def asked(devices: int | str, nodes: int, gpus: int) -> tuple[int, int]:
    """Devices a node, and nodes: as asked for, or as torchrun or srun has started.

    Parameters
    ----------
    devices
        A number, as a text too; ``"auto"`` is every GPU of this machine, and one process where there is none.
    gpus
        How many there are on this machine; 0: the CPU, where a device is a process.

    Raises
    ------
    InputError
        No such number, more than there are, or others than were started.
    """
    text, started = str(devices), launched()
    if (text != "auto" and not (text.isdecimal() and int(text) > 0)) or nodes < 1:
        raise InputError(f"--devices {devices} --nodes {nodes} is not possible; give whole numbers from 1, or auto")
    wanted = (max(gpus, 1) if text == "auto" else int(text), nodes)
    if started is not None:
        there = (started.devices, started.nodes)
        if text != "auto" and wanted not in ((1, 1), there):
            raise InputError(
                f"--devices {devices} --nodes {nodes}: {started.by} has started {there[0]} processes on each of "
                f"{there[1]} nodes; leave --devices and --nodes out, or start as many"
            )
        wanted = there
    elif nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(f"--nodes {nodes}: start it on every node with torchrun or srun, see docs/devices.md")
    if gpus and wanted[0] > gpus:
        raise InputError(
            f"--devices {wanted[0]}: this process sees {gpus} GPU{'s' * (gpus > 1)}; ask for no more (under SLURM give "
            "the GPUs to the node with --gres, not to each task)"
        )
    return wanted
