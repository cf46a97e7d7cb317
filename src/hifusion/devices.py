"""One network trained by several processes: how they start, and what they do together.

No wrapper around the network does this: a step computes its gradients alone, then all ranks add them up. So a batch can
be shared out unevenly, parameters may go unused, and a rank that runs out of memory can tell the others.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hifusion.errors import InputError
from hifusion.ranks import Share, launched

T = TypeVar("T")

# How long the others wait while the first writes, or looks at all training spots once more at the end.
PATIENCE = timedelta(hours=2)

_ENVIRONMENTS: dict[str, type[ClusterEnvironment]] = {"torchrun": TorchElasticEnvironment, "srun": SLURMEnvironment}


class _Ranks(DDPStrategy):
    """Fabric's processes and their group, with the network as it is."""

    def setup_module(self, module: nn.Module) -> Any:
        return module


def start(device: torch.device, devices: int, nodes: int, precision: str) -> Fabric:
    """Fabric on so many devices of a kind; with more than one the other processes run from here on."""
    alone = devices * nodes == 1
    given: dict[str, Any] = {"accelerator": device.type, "devices": devices, "precision": precision}
    if not alone:
        if device.type == "mps":
            raise InputError(f"--devices {devices}: Apple's GPU is one device; leave --devices out")
        started = launched()
        environment = _ENVIRONMENTS[started.by]() if started else LightningEnvironment()
        given |= {"num_nodes": nodes, "strategy": _Ranks(timeout=PATIENCE), "plugins": [environment]}
    fabric = Fabric(**given)
    if not alone:
        fabric.launch()
    return fabric


def share_of(fabric: Fabric) -> Share:
    """Which of the ranks this process is."""
    return Share(fabric.global_rank, fabric.world_size)


@contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """Leave the group at the end, and end the processes that this one has started when it fails: they would wait.

    Gloo's threads may still hold tensors of the last exchange when the interpreter ends, which aborts the process
    (https://github.com/pytorch/pytorch/pull/179291). Leaving the group waits for them.
    """
    try:
        yield
    except BaseException:
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.kill()
        raise
    finally:
        if fabric.world_size > 1:
            torch.distributed.destroy_process_group()


def by_first(fabric: Fabric, do: Callable[[], T]) -> T:
    """What the first rank's ``do`` returns, on every rank; what is refused there ends all, and is said once."""
    if fabric.world_size == 1:
        return do()
    done: tuple[T | None, str | None] = (None, None)
    if fabric.global_rank == 0:
        try:
            done = do(), None
        except InputError as error:
            done = None, str(error)
    result, refused = fabric.broadcast(done)
    if refused is not None:
        raise InputError(refused) if fabric.global_rank == 0 else SystemExit(2)
    return result  # type: ignore[return-value]


def any_rank(fabric: Fabric, value: bool) -> bool:
    """Whether it is so on any rank."""
    if fabric.world_size == 1:
        return value
    return bool(_sum(fabric, torch.tensor(float(value), device=fabric.device)) > 0)


def summed(fabric: Fabric, values: Mapping[str, Tensor], weight: float) -> dict[str, float]:
    """Each scalar times this rank's weight, added up over the ranks."""
    if fabric.world_size == 1:
        return {name: float(value.detach()) for name, value in values.items()}
    own = torch.stack([value.detach().double() for value in values.values()]) * weight
    return dict(zip(values, _sum(fabric, own).tolist(), strict=True))


def add_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes the sum of those of all ranks."""
    if fabric.world_size == 1:
        return
    gradients = [its.grad for its in parameters if its.grad is not None]
    flat = _sum(fabric, torch.cat([its.flatten() for its in gradients]))
    for gradient, total in zip(gradients, flat.split([its.numel() for its in gradients]), strict=True):
        gradient.copy_(total.view(gradient.shape))


def joint_statistics(network: nn.Module, fabric: Fabric) -> nn.Module:
    """The network, its batch norm looking at the spots of all ranks where the devices can do that: on CUDA."""
    if fabric.world_size == 1 or fabric.device.type != "cuda":
        return network
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return converted


def waits_in_forward(network: nn.Module) -> bool:
    """Whether a rank's forward pass waits for those of the others."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())


def average_statistics(network: nn.Module, fabric: Fabric) -> None:
    """Running statistics of batch norm become the mean over the ranks, where each has seen its own spots only."""
    if fabric.world_size == 1:
        return
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    statistic.copy_(_sum(fabric, statistic.clone()) / fabric.world_size)


def _sum(fabric: Fabric, value: Tensor) -> Tensor:
    return cast(Tensor, fabric.all_reduce(value, reduce_op="sum"))
