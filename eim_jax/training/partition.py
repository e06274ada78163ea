"""Which parameters a stage trains: path patterns -> labels -> `optax.partition`, and the split into trained and frozen.

Parameters are flat dicts {"st/up/kernel": array}. Gradients are taken with respect to the trained dict only; optax
sees zeros for the rest, which `set_to_zero` groups hold no state for ("gradient truncation", EIM section 3).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from eim_jax.config import Stage, patterns

FROZEN = "frozen"
Flat = dict[str, jax.Array | jax.ShapeDtypeStruct]  # leaves, or in a plan their shapes


class PartitionError(ValueError):
    """A pattern that matches nothing, or a leaf that two patterns claim."""


@dataclass(frozen=True)
class Group:
    """The leaves that one pattern trains, and the factor on the stage's learning rate."""

    pattern: str
    factor: float
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """The pattern without its trailing wildcard: st, lm, visual/prompt."""
        return self.pattern.removesuffix("/.*")


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested tree as {"a/b/c": leaf}.

    Example:
      >>> flatten({"st": {"up": {"kernel": 1}}, "scale": 2})
      {'st/up/kernel': 1, 'scale': 2}
    """
    flat = {}
    for name, child in params.items():
        if isinstance(child, Mapping):
            flat |= {f"{name}/{path}": leaf for path, leaf in flatten(child).items()}
        else:
            flat[name] = child
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested tree of a flat dict.

    Example:
      >>> unflatten({"st/up/kernel": 1, "scale": 2})
      {'st': {'up': {'kernel': 1}}, 'scale': 2}
    """
    nested: dict = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        holder = nested
        for folder in folders:
            holder = holder.setdefault(folder, {})
        holder[name] = leaf
    return nested


def match_patterns(patterns: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """Returns path -> the pattern that matches it, of those that one does.

    Args:
      patterns: regular expressions over whole paths.
      paths: of all leaves.

    Raises:
      PartitionError: a pattern matches no path, naming the nearest one, or two patterns match one.

    Example:
      >>> match_patterns(["st/.*"], ["st/up", "lm/up"])
      {'st/up': 'st/.*'}
    """
    known, owner = sorted(paths), {}
    for pattern in patterns:
        matched = [path for path in known if re.fullmatch(pattern, path)]
        if not matched:
            near = difflib.get_close_matches(pattern.replace(".*", ""), known, n=1, cutoff=0.3)
            hint = f"; the nearest leaf is {near[0]!r}" if near else ""
            raise PartitionError(f"train pattern {pattern!r} matches no parameter{hint}")
        for path in matched:
            if path in owner:
                raise PartitionError(f"{path} is matched by both {owner[path]!r} and {pattern!r}: a leaf has one label")
            owner[path] = pattern
    return owner


def groups(stage: Stage, paths) -> tuple[Group, ...]:
    """The stage's groups over these leaf paths; raises PartitionError as `match_patterns`."""
    wanted = patterns(stage)
    owner = match_patterns([pattern for pattern, _ in wanted], paths)
    return tuple(
        Group(pattern, factor, tuple(path for path, by in owner.items() if by == pattern)) for pattern, factor in wanted
    )


def labels(stage_groups: tuple[Group, ...], paths) -> dict[str, str]:
    """One label a leaf: its group's pattern, or "frozen"."""
    owner = {path: group.pattern for group in stage_groups for path in group.paths}
    return {path: owner.get(path, FROZEN) for path in paths}


def split(params: Flat, stage_groups: tuple[Group, ...]) -> tuple[Flat, Flat]:
    """(trained, frozen) leaves; `{**trained, **frozen}` merges them again."""
    owned = {path for group in stage_groups for path in group.paths}
    trained = {path: leaf for path, leaf in params.items() if path in owned}
    return trained, {path: leaf for path, leaf in params.items() if path not in owned}


def learning_rate(stage: Stage, total_steps: int) -> optax.Schedule:
    """Warm-up from 0, then the stage's decay: step -> learning rate (ClipCap: linear to 0)."""
    warmup = stage.warmup_steps
    if warmup >= total_steps:
        raise ValueError(f"warmup_steps={warmup} leaves nothing of the stage's {total_steps} steps: lower warmup_steps")
    rest = total_steps - warmup
    if stage.schedule == "linear":
        decay = optax.linear_schedule(stage.lr, 0.0, rest)
    elif stage.schedule == "cosine":
        decay = optax.cosine_decay_schedule(stage.lr, rest)
    else:
        decay = optax.constant_schedule(stage.lr)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, stage.lr, warmup), decay], [warmup])


def optimizer(stage: Stage, stage_groups: tuple[Group, ...], paths, total_steps: int) -> optax.GradientTransformation:
    """The stage's `optax.partition`: AdamW a group, zeros and no state for frozen leaves.

    Clipping (`clip_norm`) measures the trained gradients together: the zeros of frozen leaves add nothing to the norm.
    """
    rate = learning_rate(stage, total_steps)

    trained = [path for group in stage_groups for path in group.paths]
    if stage.decay_also and not any(re.fullmatch(stage.decay_also, path) for path in trained):
        raise PartitionError(f"decay_also={stage.decay_also!r} matches no parameter that the stage trains")

    def decays(where, leaf) -> bool:
        return _is_matrix(where, leaf) or bool(re.fullmatch(stage.decay_also, where[-1].key))

    adam = optax.scale_by_adam if stage.eps_added == "after" else _scale_by_adam_before

    def adamw(factor):
        return optax.chain(
            adam(stage.b1, stage.b2, stage.eps),
            optax.add_decayed_weights(stage.weight_decay, lambda tree: jax.tree_util.tree_map_with_path(decays, tree)),
            optax.scale_by_learning_rate(lambda count: factor * rate(count)),
        )

    transforms = {group.pattern: adamw(group.factor) for group in stage_groups}
    partition = optax.partition({**transforms, FROZEN: optax.set_to_zero()}, labels(stage_groups, paths))
    if stage.clip_norm > 0:
        return optax.chain(optax.clip_by_global_norm(stage.clip_norm), partition)
    return partition


def _scale_by_adam_before(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with eps added to the root of v before the bias correction, as transformers' AdamW (up to 4) did.

    By optax's own moments: m' / (sqrt(v') + eps / sqrt(1 - b2^t)) with m', v' corrected, so that a step's first
    hundreds have a larger eps than Adam's paper gives them (31 times at t = 1 and b2 = 0.999).
    """
    moments = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state: Any, params=None):
        state = cast(Any, moments.update(updates, state, params)[1])
        first, second = 1 - b1**state.count, 1 - b2**state.count

        def direction(m, v):
            return None if m is None else m / first / (jnp.sqrt(v / second) + eps / jnp.sqrt(second))

        return jax.tree.map(direction, state.mu, state.nu), state

    return optax.GradientTransformation(moments.init, update)


def _is_matrix(where, leaf) -> bool:
    """Whether weight decay applies: two dimensions besides the layer axis of scanned blocks, prompts and adapters."""
    from eim_jax.models.adapters import has_layer_axis  # here: the adapters bring flax, which a partition does without

    path = where[-1].key
    if path.endswith("/bias"):  # those of a layer's two router paths are stacked
        return False
    stacked = "/blocks/" in path or has_layer_axis(path)
    return jnp.ndim(leaf) - stacked >= 2


def digest(flat: Flat) -> dict[str, int]:
    """A 32-bit digest of each leaf's bits, computed where it lies: the proof that frozen leaves stayed as they were."""
    return {path: int(value) for path, value in jax.device_get(_bits(flat)).items()}


@jax.jit
def _bits(flat: Flat) -> dict[str, jax.Array]:
    """For each leaf a 32-bit sum over its bits, each weighted by its place: a changed element changes it."""

    def one(leaf):
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):  # without a reshape, which would gather a sharded leaf
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return jnp.sum((bits ^ (bits >> 15)) * (2 * place + 1), dtype=jnp.uint32)

    return {path: one(leaf) for path, leaf in flat.items()}
