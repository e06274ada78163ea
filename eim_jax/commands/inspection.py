"""`--mode=inspect`: a few training samples as the losses see them, before or after training."""

from pathlib import Path

import numpy as np
from PIL import Image
from rich.text import Text

from eim_jax.commands.trained_arms import check_identity, trained
from eim_jax.config import Config, ConfigError
from eim_jax.data import loader
from eim_jax.losses.kinds import ContrastiveLoss
from eim_jax.losses.neighbours import similarities
from eim_jax.losses.table import losses_of
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM
from eim_jax.training import arm_model, low_rank, partition, setup
from eim_jax.training.partition import Flat
from eim_jax.training.queue_report import tell_queue
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console, print_table, shown

NEAREST = 3


def inspect(config: Config, workdir: Path, arm: str, samples: int, neighbours: bool = False) -> None:
    """Shows training samples as the losses see them.

    Args:
      config: the run's.
      workdir: the run's.
      arm: which arm's losses.
      samples: how many.
      neighbours: also each queue loss's nearest keys, by the arm as trained, or as training would start. Builds the
        queues that the workdir does not hold.
    """
    inputs = setup.load(config, workdir)
    check_identity(inputs)
    if said := low_rank.described(arm_model.model(inputs, config.arm[arm]).parts):
        console.print(f"arm {arm}: {said}", soft_wrap=True)
    if not neighbours:
        show_samples(inputs, arm, samples)
        console.print("--neighbours shows the nearest rows of each loss's queue, which it builds", style="dim")
        return
    try:
        model = trained(inputs, arm)
        console.print(f"arm {arm} after training", soft_wrap=True)
    except ConfigError:
        model = arm_model.start(inputs, config.arm[arm])
        console.print(f"arm {arm} as it starts to train (not all its stages are finished)", soft_wrap=True)
    show_samples(inputs, arm, samples, model)


def show_samples(inputs: Inputs, arm: str, samples: int, model: tuple[VLM, Flat] | None = None) -> None:
    """Prints images and text with the supervised tokens coloured; given a model, each loss's nearest queue rows too."""
    config, split = inputs.config, inputs.train
    chosen = config.arm[arm].sequence
    contrasts = [loss for loss in losses_of(*(config.stages[name] for name in chosen)) if loss.queue is not None]
    samples = min(samples, len(split))
    iterator = loader.batches(
        split,
        inputs.encoded,
        fields={"image", "has_image", "tokens", "valid", "supervised"},
        batch_size=samples,
        seed=config.seed,
        epochs=1,
        image_size=inputs.clip.vision.image_size,
        fit=inputs.fit,
    )
    batch = next(iterator)
    iterator.close()
    nearest = {} if model is None else {loss.name: _nearest(inputs, *model, batch, loss) for loss in contrasts}
    for b, row in enumerate(batch.index):
        sample = split.samples[row]
        console.rule(f"row {row}: sample {sample.id}")
        if sample.image is not None:
            console.print(f"image {split.images.names[sample.image]}", soft_wrap=True)
            if console.color_system:
                console.print(picture(Image.fromarray(batch.image[b])))
        console.print(tokens(inputs, batch, b), soft_wrap=True)
        supervised = int(batch.supervised[b].sum())
        console.print(
            f"{supervised} of {int(batch.valid[b].sum())} tokens are supervised ([green], the others dim)", style="dim"
        )
        for loss in contrasts if nearest else ():
            similar, order = nearest[loss.name]
            own = int((similar[b] > similar[b, row]).sum()) + 1
            rows = [
                (f"{similar[b, j]:.3f}", "own" if j == row else "", int(j), split.samples[j].response) for j in order[b]
            ]
            title = f"{loss.title}: nearest of {len(split):,} rows of queue {loss.queue.name}"
            title += f"; its own key is number {own:,}"
            print_table(title, [config.losses.similarity, "", "row", "response"], rows)


def tokens(inputs: Inputs, batch: Batch, b: int) -> Text:
    """The sample's tokens, each set apart; supervised ones [green]."""
    line = Text()
    for token, valid, supervised in zip(batch.tokens[b], batch.valid[b], batch.supervised[b], strict=True):
        if valid:
            word = inputs.lm_tokenizer.decode([int(token)])
            word = word.strip() or repr(word)
            # The brackets say it where there are no colours.
            word = shown(word)
            line.append(f"[{word}]" if supervised else word, style="bold green" if supervised else "dim")
            line.append(" ")
    return line


def picture(image: Image.Image, columns: int = 32) -> Text:
    """An image for the terminal: two pixels a character."""
    rows = round(columns * image.height / image.width / 2) * 2
    pixels = np.asarray(image.convert("RGB").resize((columns, rows)))
    text = Text()
    for top, bottom in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(top, bottom, strict=True):
            text.append("▀", style=f"rgb({above[0]},{above[1]},{above[2]}) on rgb({below[0]},{below[1]},{below[2]})")
        text.append("\n")
    return text


def _nearest(
    inputs: Inputs, vlm: VLM, params: Flat, batch: Batch, loss: ContrastiveLoss
) -> tuple[np.ndarray, np.ndarray]:
    """(similarity of each sample's query to every row [b N], the NEAREST rows in order [b 3])."""
    queue = inputs.queue(vlm, loss.queue)
    tell_queue(inputs, loss, queue)
    similar = similarities(vlm, inputs.config.losses, loss, partition.unflatten(params), batch, queue)
    similar = np.asarray(similar)[:, : queue.count]
    return similar, np.argsort(-similar, axis=1)[:, :NEAREST]
