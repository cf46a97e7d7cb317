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
    """Without tracking a batch norm in training mode looks at its batch alone, as before, and notes nothing."""
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before, strict=True):
            norm.track_running_stats = tracked
