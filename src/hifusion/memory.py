"""What is done when memory runs out: the same result from less of it, or one line that says what to lower."""

import gc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hifusion.errors import InputError
from hifusion.models import BY_SPOT
from hifusion.models.resnet import ResNet

T = TypeVar("T")

# Besides torch.OutOfMemoryError, which CUDA's own allocator raises: the CPU's, Apple's, and CUDA's libraries.
_MESSAGES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

_at_once: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Spots that a network has turned out to be able to take at a time."""


class Pieces(NamedTuple):
    """The outputs that are looked at, put together from those of several forward passes."""

    expression: Tensor
    embedding: Tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def in_pieces(model: nn.Module, region: Tensor, inputs: Mapping[str, Tensor]) -> Any:
    """Output of a forward pass without gradients; of fewer spots at a time where memory runs out.

    The number that fitted is kept for the network's later batches. In evaluation mode a spot's prediction does not
    depend on the others of its batch.

    Raises
    ------
    InputError
        One spot, or a section that cannot be split, needs more memory than there is.
    """
    while True:
        size = min(_at_once.get(model, len(region)), len(region))
        output, failed = _tried(_forward, model, region, inputs, size)
        if not failed:
            return output
        side, device = region.shape[-1], region.device.type
        if getattr(model, "whole_section", False):
            raise InputError(
                f"out of memory ({device}): {type(model).__name__} takes the {len(region)} spots of a section at once; "
                "use a device with more memory, or a network that takes spots one by one, such as hifusion"
            )
        if size == 1:
            raise InputError(
                f"out of memory ({device}): a single spot of {side} px does not fit; end what else uses the memory, or "
                "use a device with more of it"
            )
        _at_once[model] = size // 2
        _free(region.device)


def _forward(model: nn.Module, region: Tensor, inputs: Mapping[str, Tensor], size: int) -> Any:
    if size == len(region):
        return model(region, **inputs)
    outputs = []
    for start in range(0, len(region), size):
        part = slice(start, start + size)
        its = {name: value[part] if name in BY_SPOT else value for name, value in inputs.items()}
        output = model(region[part], **its)
        outputs.append(Pieces(output.expression, output.embedding))
    return Pieces(*(torch.cat(values) for values in zip(*outputs, strict=True)))


def recompute(network: nn.Module) -> bool:
    """Let the trunks of a network compute activations anew in the backward pass; False where it has none.

    Splitting the batch would change the result, since batch norm looks at all of it; this does not.
    """
    trunks = [module for module in network.modules() if isinstance(module, ResNet)]
    for trunk in trunks:
        trunk.recompute = True
    return bool(trunks)


def recomputes(network: nn.Module) -> bool:
    """Whether :func:`recompute` was called."""
    return any(isinstance(module, ResNet) and module.recompute for module in network.modules())


def learn(
    network: nn.Module,
    attempt: Callable[[], T],
    *,
    device: torch.device,
    generator: torch.Generator,
    agree: Callable[[bool], bool],
    advice: str,
) -> T:
    """What ``attempt`` returns; where memory runs out, of a second that keeps no activations (:func:`recompute`).

    Random numbers and running statistics are put back in between, so that the result is that of the first attempt.

    Parameters
    ----------
    attempt
        The forward and backward pass of one batch; leaves gradients only.
    generator
        Where the attempt may draw from, beside torch's own generators.
    agree
        Whether memory ran out on any of the devices that learn together, from whether it did here.
    advice
        What to do where it runs out again.

    Raises
    ------
    InputError
        The second attempt does not fit either, or the network has no trunk to compute anew.
    """
    before = None if recomputes(network) else _State(network, device, generator)
    result, failed = _tried(attempt)
    if agree(failed):
        if before is None or not recompute(network):
            raise InputError(f"out of memory ({device.type}) in a training step; {advice}")
        before.put_back()
        _free(device)
        result, failed = _tried(attempt)
        if agree(failed):
            raise InputError(f"out of memory ({device.type}) in a training step, twice; {advice}")
    return result  # type: ignore[return-value]


class _State:
    """What a training step changes before it may fail."""

    def __init__(self, network: nn.Module, device: torch.device, generator: torch.Generator):
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        self.statistics = [(its, its.clone()) for norm in norms for its in norm.buffers(recurse=False)]
        self.device, self.generator = device, generator
        self.drawn = torch.get_rng_state(), generator.get_state()
        # A backward pass that fails on the CPU leaves its unfinished nodes, and so all activations, in the queue of
        # this thread. A later one drops what is ahead of it: nodes that are younger than its own.
        self.older = torch.zeros((), requires_grad=True) * 1
        self.drawn_there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back(self) -> None:
        self.older.backward()
        for statistic, value in self.statistics:
            statistic.copy_(value)
        torch.set_rng_state(self.drawn[0])
        self.generator.set_state(self.drawn[1])
        if self.drawn_there is not None:
            torch.cuda.set_rng_state(self.drawn_there, self.device)


def _tried(function: Callable[..., T], *given: Any) -> tuple[T | None, bool]:
    """The result, or that memory ran out; the error is let go with all that its traceback holds on to."""
    try:
        return function(*given), False
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None, True


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
