"""EIM in JAX: contrastive losses against whole-data-set queues, trained in segmented stages.

What a loop of one's own takes from here needs jax, optax and numpy alone: `Queue`, `queue_nce`, `partition`, `Stages`.
`load` opens a finished run and needs the extra `train`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eim_jax.api import Run, load
    from eim_jax.losses.contrastive import NCE, queue_nce
    from eim_jax.losses.queues import Queue
    from eim_jax.training.own_loop import Partition, Stages, partition

__version__ = "0.1.0"
__all__ = ["NCE", "Partition", "Queue", "Run", "Stages", "load", "partition", "queue_nce"]


def __getattr__(name: str) -> Any:
    """Imports a name when it is first asked for, so that `import eim_jax` costs nothing (PEP 562)."""
    if name in ("NCE", "queue_nce"):
        from eim_jax.losses import contrastive as holder
    elif name == "Queue":
        from eim_jax.losses import queues as holder
    elif name in ("Partition", "Stages", "partition"):
        from eim_jax.training import own_loop as holder
    elif name in ("Run", "load"):
        from eim_jax import api as holder
    else:
        raise AttributeError(f"module 'eim_jax' has no attribute {name!r}")
    return getattr(holder, name)


def __dir__() -> list[str]:
    """What there is, imported or not."""
    return [*__all__, "__version__"]
