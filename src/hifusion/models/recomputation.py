"""Activations that are not kept for the backward pass but computed once more in it: less memory, the same gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """`function(x)`, of which the backward pass finds only `x` and computes the rest anew.

    Parameters
    ----------
    modules
        What `function` runs: their batch norms take the batch into their running statistics once, not once more when
        it is computed anew.
    """
    norms = [norm for module in modules for norm in module.modules() if isinstance(norm, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms)

    out: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
    return out


@contextmanager
def _statistics_kept(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """With a momentum of 0 a batch norm looks at its batch as before, and its running statistics stay what they are.

    Without running statistics it would save other tensors for the backward pass than the first time.
    """
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
