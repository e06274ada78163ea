"""Whether a stage packs its texts (`config.data.pack`), and into which rows."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from eim_jax.config import Config, ConfigError, Stage
from eim_jax.data import loader
from eim_jax.data.packing import PAYS, Packer, choose
from eim_jax.losses import objective
from eim_jax.models.lora import plain
from eim_jax.models.vlm import VLM
from eim_jax.parallel.sharding import parts_of
from eim_jax.training.context import tokens_before
from eim_jax.training.setup import Inputs


def check_packing(vlm: VLM, stage: Stage, config: Config) -> None:
    """Refuses packing where the language model cannot do it, before anything is compiled.

    Raises:
      ConfigError: `data.pack` is "on", and the language model reads one sample a row.
    """
    if config.data.pack == "on" and objective.readings(stage, config.losses) and not reads_packed(vlm):
        family = vlm.lm.config.model_type
        raise ConfigError(
            f"config.data.pack=on: the language model ({family}) reads one sample a row: its `hidden` takes no "
            "`packed`: set config.data.pack=off, or give the family that argument (docs/guides/padding.md)"
        )


def stage_packer(
    inputs: Inputs, vlm: VLM, stage: Stage, params: Mapping[str, Any], drawn: Mapping[str, Any], name: str
) -> tuple[Packer | None, str]:
    """Decides how a stage's batches are packed, from lengths alone, so that a resumed run decides the same.

    Args:
      inputs: what all arms share.
      vlm: the arm's modules.
      stage: whose losses say what the LM reads.
      params: all leaves, or their shapes.
      drawn: what `loader.order_of` takes by name.
      name: the stage's, for messages.

    Returns:
      What packs a batch, None where nothing does; and a line that says it, "" where the LM reads nothing.
    """
    data = inputs.config.data
    readings = sorted(objective.readings(stage, inputs.config.losses))
    if data.pack == "off" or not readings:
        return None, ""
    if not reads_packed(vlm):
        family = vlm.lm.config.model_type
        return None, f"{name}: each sample has a row of its own: this language model ({family}) takes no other"
    order = loader.order_of(inputs.samples, inputs.encoded, **drawn)
    assert order.lengths is not None, "what the language model reads is text"
    pictured = np.fromiter((sample.image is not None for sample in inputs.samples.samples), bool, order.samples)
    lengths = {reading: order.lengths + before(vlm, params, pictured, reading) for reading in readings}
    batches = [order.rows(step) for step in range(order.samples // order.batch_size)]
    widest = int(order.lengths.max())
    packer, saving = choose(
        lengths,
        order.lengths,
        batches,
        [order.width(rows) or widest for rows in batches],
        width=vlm.lm.config.width,
        head_width=vlm.lm.config.head_width,
        parts=parts_of(inputs.mesh) * stage.accumulate,
        accumulate=stage.accumulate,
        shapes=data.buckets,
    )
    found = sorted(shape for shapes in packer.shapes.values() for shape in shapes)
    share, left = f"{saving.before:.0%} of the text is padding", f"{1 / saving.factor:.0%} of the language model's work"
    if not all(packer.shapes.values()) or (data.pack == "auto" and saving.factor < PAYS):
        return None, f"{name}: each sample has a row of its own: {share}, but sharing rows would leave {left}"
    rows = " or ".join(f"{shape.rows} rows of {shape.length} slots" for shape in found)
    return packer, (
        f"{name}: samples share rows: {stage.batch // packer.parts} in {rows}; {share} without it, "
        f"{saving.after:.0%} with it; it leaves {left}"
    )


def reads_packed(vlm: VLM) -> bool:
    """Returns whether the language model's blocks take several samples in one row."""
    return "packed" in inspect.signature(plain(vlm.lm).hidden).parameters


def before(vlm: VLM, params: Mapping[str, Any], pictured: np.ndarray, reading: str) -> np.ndarray:
    """Returns how many slots stand before each text [N]: BOS, and with an image its marker and visual tokens."""
    alone = tokens_before(vlm, params, with_image=False)
    if reading == "text":
        return np.full(len(pictured), alone)
    every = tokens_before(vlm, params, with_image=True)
    if every == alone:  # the adapter takes the image elsewhere
        return np.full(len(pictured), alone)
    return np.where(pictured, every, alone + len(vlm.without_image))
