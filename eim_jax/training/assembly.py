"""A stage put together once: what it trains, its optimizer, its queues and its compiled step.

Training calls it with arrays, a plan and the benchmarks with shapes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eim_jax.config import Losses, Stage
from eim_jax.losses.kinds import QueueKind
from eim_jax.losses.objective import make_objective
from eim_jax.losses.queues import Queue
from eim_jax.losses.table import queues_of
from eim_jax.models.vlm import VLM
from eim_jax.parallel.sharding import param_shardings
from eim_jax.training import partition
from eim_jax.training.partition import Flat, Group
from eim_jax.training.step import make_step


class Assembly(NamedTuple):
    """A stage's parts.

    `step` takes (trained, opt_state, frozen, batch, queues, key, step number) and gives the new (trained, opt_state,
    metrics); it donates the first two.
    """

    groups: tuple[Group, ...]
    trained: Flat
    frozen: Flat
    tx: optax.GradientTransformation
    opt_state: Any  # as shapes, with shardings where there is a mesh
    queues: dict[str, Queue]
    step: Callable

    def init_state(self) -> Any:
        """The optimizer's state as arrays, each made where it will lie."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.opt_state)
        return jax.jit(self.tx.init, out_shardings=where)({**self.trained, **self.frozen})


def assemble(
    vlm: VLM,
    stage: Stage,
    settings: Losses,
    params: Flat,
    steps: int,
    queue_of: Callable[[QueueKind], Queue],
    mesh: Mesh | None = None,
) -> Assembly:
    """Groups, split, optimizer, queues and the jitted step of a stage.

    Args:
      vlm: the arm's modules.
      stage: what trains, on which losses, how fast.
      settings: the config's `losses`.
      params: all leaves, as arrays or as shapes (with shardings where there is a mesh).
      steps: of the stage, for its learning rate.
      queue_of: gives the queue of a kind, as arrays or as shapes; asked for those alone that the stage's losses read.
      mesh: over which everything lies; None: one device.

    Raises:
      PartitionError: a pattern of the stage matches nothing, or two claim a leaf.
    """
    groups = partition.groups(stage, params)
    trained, frozen = partition.split(params, groups)
    vlm = vlm.for_stage(trained)
    tx = partition.optimizer(stage, groups, params, steps)
    opt_state = jax.eval_shape(tx.init, {**trained, **frozen})
    queues = {kind.name: queue_of(kind) for kind in queues_of(stage)}
    step = make_step(vlm, stage, make_objective(vlm, stage, settings, mesh), tx, vlm.dropout > 0)
    if mesh is None:
        step = jax.jit(step, donate_argnums=(0, 1))
    else:
        where = state_shardings(opt_state, params, mesh)
        opt_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), opt_state, where
        )
        # Parameters and moments come out as they went in; else XLA may choose another layout for the next step.
        kept = jax.tree.map(lambda leaf: leaf.sharding, (trained, opt_state))
        whole = NamedSharding(mesh, PartitionSpec())
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, whole))
    return Assembly(groups, trained, frozen, tx, opt_state, queues, step)


def state_shardings(opt_state: Any, params: Flat, mesh: Mesh) -> Any:
    """Optimizer moments lie where their parameter lies; counters are replicated."""
    shardings = param_shardings(params, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(where, leaf):
        path = next((k.key for k in reversed(where) if isinstance(k, jax.tree_util.DictKey) and k.key in params), None)
        return shardings[path] if path is not None and leaf.shape == params[path].shape else whole

    return jax.tree_util.tree_map_with_path(place, opt_state)
