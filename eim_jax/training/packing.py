"""Whether a stage packs its texts (`config.data.pack`), and into which rows."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from eim_jax.config import ConfigError, Stage
from eim_jax.data import loader
from eim_jax.data.packing import PAYS, Packer, choose
from eim_jax.losses import objective
from eim_jax.models.lora import plain
from eim_jax.models.vlm import VLM
from eim_jax.parallel.sharding import parts_of
from eim_jax.training.context import tokens_before
from eim_jax.training.setup import Inputs


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

    Raises:
      ConfigError: `data.pack` is "on", and this language model reads one sample a row.
    """
    data = inputs.config.data
    readings = sorted(objective.readings(stage, inputs.config.losses))
    if data.pack == "off" or not readings:
        return None, ""
    if not reads_packed(vlm):
        family = vlm.lm.config.model_type
        if data.pack == "on":
            raise ConfigError(
                f"config.data.pack=on: the language model ({family}) reads one sample a row: its `hidden` takes no "
                "`packed`: set config.data.pack=off, or give the family that argument (docs/guides/padding.md)"
            )
        return None, f"{name}: not packed: the language model ({family}) reads one sample a row"
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
        parts=parts_of(inputs.mesh) * stage.accumulate,
        accumulate=stage.accumulate,
        shapes=data.buckets,
    )
    share, less = f"{saving.before:.0%} of the text slots are padding", f"{saving.factor:.2f} times less work"
    found = [shape for shapes in packer.shapes.values() for shape in shapes]
    if not found or (data.pack == "auto" and saving.factor < PAYS):
        return None, f"{name}: not packed: {share}, packing gives the language model only {less}"
    rows = " or ".join(f"{shape.rows} x {shape.length}" for shape in sorted(found))
    return packer, (
        f"{name}: packed: {share}, {saving.after:.0%} when samples share rows ({rows} slots, {packer.parts} a batch): "
        f"{less} for the language model"
    )


def reads_packed(vlm: VLM) -> bool:
    """Returns whether the language model's blocks take several samples in one row."""
    return "packed" in inspect.signature(type(plain(vlm.lm)).hidden).parameters


def before(vlm: VLM, params: Mapping[str, Any], pictured: np.ndarray, reading: str) -> np.ndarray:
    """Returns how many slots stand before each text [N]: BOS, and with an image its marker and visual tokens."""
    alone = tokens_before(vlm, params, with_image=False)
    if reading == "text":
        return np.full(len(pictured), alone)
    every = tokens_before(vlm, params, with_image=True)  # both markers and the visual tokens
    if every == alone:  # the adapter takes the image elsewhere
        return np.full(len(pictured), alone)
    return np.where(pictured, every - len(vlm.without_image), alone + len(vlm.without_image))
