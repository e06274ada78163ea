"""An arm's modules and the parameters that it starts from."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp

from eim_jax.config import Arm, ConfigError, Stage
from eim_jax.losses.table import heads
from eim_jax.models.adapters import adapter_of
from eim_jax.models.connector import ST_KINDS, STConfig, make_st
from eim_jax.models.language import family_of
from eim_jax.models.lora import Tuned
from eim_jax.models.quant import NF4_SCALES
from eim_jax.models.vision import VISION_TOWERS, build_text
from eim_jax.models.vlm import VLM
from eim_jax.parallel.sharding import param_shardings, shard_params
from eim_jax.pretrained.tokenizer import bos_id
from eim_jax.training import initial, joint_space, low_rank, partition
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs


def model(inputs: Inputs, arm: Arm) -> VLM:
    """Returns the arm's modules; no parameters.

    Raises:
      ConfigError: the arm's adapter does not fit the language model, or its features the vision tower.
    """
    adapter, family = adapter_of(arm), family_of(inputs.lm.config)
    vision = replace(
        inputs.clip.vision,
        prompts=arm.prompts,
        prompt_hidden=arm.prompt_hidden if arm.prompts else 0,
        adapter=adapter.in_vision(arm) if adapter is not None and arm.visual_adapter else None,
    )
    joint_space.check(inputs.config, arm, vision, inputs.clip.text)
    st = STConfig(
        kind=arm.st,
        width_in=vision.joint if arm.output_layer else vision.width,
        width_out=inputs.lm.config.width,
        tokens=arm.st_tokens,
        clip_length=arm.st_clip_length,
        bias=arm.st_bias,
        hidden=arm.st_hidden if ST_KINDS[arm.st].sized_by_arm else 0,
        layers=arm.st_layers,
        heads=arm.st_heads,
        dtype=inputs.dtype,
    )
    lm = inputs.lm.config
    if adapter is not None:
        if not family.takes_adapters:
            raise ConfigError(
                f"config.arm.*.adapter={arm.adapter!r}: config.towers.lm is a {family.title}, which takes no adapters"
            )
        try:
            lm = replace(lm, adapter=adapter)
        except ValueError as error:
            raise ConfigError(f"config.arm.*.adapter={arm.adapter!r}: {error}") from error
    markers = {} if adapter is None else adapter.markers(inputs.lm_tokenizer)._asdict()
    seeing = VISION_TOWERS[vision.model_type]
    parts = {"visual": seeing.build(vision), "lm": family.build(lm)}
    parts = low_rank.tuned(arm, parts, {"visual": seeing.rows_of(vision), "lm": family.rows(lm)}, inputs.towers)
    return VLM(
        visual=parts["visual"],
        text=None if inputs.clip.text is None else build_text(vision, inputs.clip.text),
        st=make_st(st),
        lm=parts["lm"],
        features=arm.features,
        output_layer=arm.output_layer,
        normalize=arm.normalize_prefix,
        bos=bos_id(inputs.lm_tokenizer),
        mesh=inputs.mesh,
        **markers,
    )


def fresh(vlm: VLM, key: jax.Array, stages: Sequence[Stage] = ()) -> Flat:
    """The parameters that no checkpoint holds, drawn from the key.

    The ST's, prompts', adapters', low-rank terms', and what losses of these stages have of their own.
    """
    drawn = {"st": vlm.st.init(jax.random.fold_in(key, 1), jnp.zeros((1, 1, vlm.st.config.width_in)))["params"]}
    visual, size = vlm.visual.config, vlm.visual.config.image_size
    own = VISION_TOWERS[visual.model_type].drawn
    if visual.prompts or visual.adapter or own:  # the tower around them is shape alone: XLA drops what is not returned
        tower = vlm.visual.init(jax.random.fold_in(key, 2), jnp.zeros((1, size, size, 3)))["params"]
        drawn["visual"] = {name: tower[name] for name in ("prompt", "adapter", *own) if name in tower}
    if vlm.lm.config.adapter is not None:
        tower = vlm.lm.init(jax.random.fold_in(key, 3), jnp.zeros((1, 1), jnp.int32))["params"]
        drawn["lm"] = {"adapter": tower["adapter"]}
    drawn |= {"loss": own} if (own := heads(vlm, key, *stages)) else {}
    flat = partition.flatten(drawn)
    for i, (name, part) in enumerate(vlm.parts, start=4):
        if isinstance(part, Tuned):
            flat |= {f"{name}/{path}": leaf for path, leaf in part.draw(jax.random.fold_in(key, i)).items()}
    return flat


def shapes(inputs: Inputs, arm: Arm, vlm: VLM) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of an arm as `start` holds it, nothing allocated."""
    drawn = jax.eval_shape(lambda key: fresh(vlm, key, _stages(inputs, arm)), jax.random.key(0))
    params = {**inputs.towers, **drawn}
    held = _held(inputs, arm, params)
    return {path: jax.ShapeDtypeStruct(leaf.shape, held[path]) for path, leaf in params.items()}


def _stages(inputs: Inputs, arm: Arm) -> list[Stage]:
    return [inputs.config.stages[name] for name in arm.sequence]


def _held(inputs: Inputs, arm: Arm, params: Flat) -> dict[str, jnp.dtype]:
    """Each leaf's dtype: float32 for those that some stage trains, the compute dtype for others; NF4's as they are."""
    ever = {path for stage in _stages(inputs, arm) for g in partition.groups(stage, params) for path in g.paths}

    def dtype(path: str, leaf) -> jnp.dtype:
        whole = path in ever or not jnp.issubdtype(leaf.dtype, jnp.floating) or path.rpartition("/")[2] in NF4_SCALES
        return leaf.dtype if whole else inputs.dtype

    return {path: dtype(path, leaf) for path, leaf in params.items()}


def start(inputs: Inputs, arm: Arm) -> tuple[VLM, Flat]:
    """The arm's model and its parameters before the first stage: pretrained towers, what `fresh` draws by the seed.

    What config.init holds stands in place of both.
    """
    vlm = model(inputs, arm)
    draw, key = functools.partial(fresh, vlm, stages=_stages(inputs, arm)), jax.random.key(inputs.config.seed)
    where = param_shardings(jax.eval_shape(draw, key), inputs.mesh)
    params: Flat = {**inputs.towers, **jax.jit(draw, out_shardings=where)(key)}
    held = _held(inputs, arm, params)
    params |= initial.read(inputs, arm, vlm, params, held)
    leaves = {path: cast(jax.Array, leaf).astype(held[path]) for path, leaf in params.items()}
    return vlm, {**shard_params(leaves, inputs.mesh)}
