"""Stacks of blocks, unrolled or scanned over layers, and the forms in which a tower can be computed."""

from typing import Any, TypedDict, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from eim_jax.models.layers import Block, BlockConfig
from eim_jax.models.linear import PRODUCT

# Rematerialisation by name: None keeps every intermediate, "full" keeps block inputs only, "dots" also matmul results.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
}


class Form(TypedDict, total=False):
    """How a tower is computed, whatever its weights: keyword arguments of all that shapes or loads towers.

    Keys:
      scan: stack the layers' leaves and scan over them; compiles faster where there are many.
      remat: what the backward pass recomputes, a name in REMAT_POLICIES.
      attention: a name in attention.ATTENTIONS.
      dtype: of computation.
    """

    scan: bool
    remat: str
    attention: str
    dtype: DTypeLike


def make_blocks(config: BlockConfig, layers: int, *, scan: bool, remat: str):
    """Returns what a module's setup() assigns to `self.blocks`: a list of blocks, or one scanned block.

    Args:
      config: shape of every block.
      layers: number of blocks.
      scan: one stacked block (leaves get a leading layer axis) instead of blocks_0, blocks_1, ...
      remat: a name in REMAT_POLICIES.
    """
    every = nn.broadcast
    axes = (every, every, every, 0, 0, 0, every)
    # Arguments 3 and 8 of __call__ (self is 0) are the Python bools `train` and `watch`.
    return stack(Block, config, layers, scan=scan, remat=remat, static=(3, 8), axes=axes)


def stack(block: type[nn.Module], config, layers: int, *, scan: bool, remat: str, static: tuple[int, ...], axes: tuple):
    """Returns a list of blocks, or one block scanned over layers, from the block's class.

    Args:
      block: a module class that is built from `config` alone.
      config: what it is built from.
      layers: number of blocks.
      scan: one stacked block (leaves get a leading layer axis) instead of a list.
      remat: a name in REMAT_POLICIES.
      static: which arguments of the block's __call__ are Python values (self is 0): they are not traced.
      axes: for each argument behind the first, which is carried from block to block, what a scan does with it: 0 takes
        a slice a layer, nn.broadcast gives every layer the whole.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat {remat!r} is not one of {sorted(REMAT_POLICIES)}")
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], static_argnums=static, prevent_cse=not scan)
    if not scan:
        return [block(config) for _ in range(layers)]
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=cast(Any, axes),
        length=layers,
    )
    return scanned(config)


def run_blocks(
    blocks,
    x: Float[Array, "b t d"],
    *,
    mask: Bool[Array, "#b 1 t s"] | None = None,
    train: bool = False,
    prompts: Float[Array, "layers p d"] | None = None,
    leaves: dict | None = None,
    start: Int[Array, ""] | None = None,
    kv=None,
):
    """Runs x through what make_blocks returned.

    Args:
      blocks: a list of blocks or one scanned block.
      x: the first block's input.
      mask: True where a query may see a key (or a cache slot); None sees all.
      train: dropout is on; needs the rng "dropout".
      prompts: each block's prompt tokens.
      leaves: the adapter's, each with a leading layer axis.
      start: the cache slot that x's first token takes.
      kv: a tuple of every layer's slots (unrolled) or one stacked pair (scanned); None without a cache.

    Returns:
      The last block's output and the updated slots, in the form in which they came.
    """
    x, kv, _ = _run(blocks, x, mask, train, start, prompts, leaves, kv, watch=False)
    return x, kv


def first_tokens(
    blocks,
    x: Float[Array, "b t d"],
    *,
    train: bool = False,
    prompts: Float[Array, "layers p d"] | None = None,
    leaves: dict | None = None,
) -> Float[Array, "layers b d"]:
    """Returns token 0 of every block's output; the arguments are run_blocks'."""
    return cast(Any, _run(blocks, x, None, train, None, prompts, leaves, None, watch=True)[2])


def _run(blocks, x, mask, train, start, prompts, leaves, kv, watch):
    """run_blocks' result and, if `watch`, token 0 of every block's output [layers b d]."""
    prompts = None if prompts is None else prompts[:, None]
    if not isinstance(blocks, (list, tuple)):
        x, (kv, first) = blocks(x, mask, train, start, prompts, leaves, kv, watch)
        return x, kv, first
    slots, first = [], []
    for i, block in enumerate(blocks):
        prompt, leaf = jax.tree.map(lambda a, i=i: a[i], (prompts, leaves))
        x, (new, token) = block(x, mask, train, start, prompt, leaf, None if kv is None else kv[i], watch)
        slots.append(new)
        first.append(token)
    return x, None if kv is None else tuple(slots), jnp.stack(first) if watch else None
