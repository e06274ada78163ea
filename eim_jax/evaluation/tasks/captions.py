"""The task "captions": one text an image, compared with what people wrote about it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eim_jax.data import tokenize
from eim_jax.data.rows import row_options
from eim_jax.data.samples import Split
from eim_jax.data.text_files import identifier
from eim_jax.evaluation.metrics import caption_scores
from eim_jax.evaluation.metrics.caption_overlap import caption_rows
from eim_jax.evaluation.metrics.likelihood import likelihood_rows
from eim_jax.evaluation.tasks.task import Asked, Item, Predicted, Predictions, Scored, Task
from eim_jax.generation.batched_inference import likelihoods
from eim_jax.generation.visual_tokens import encode_images
from eim_jax.models.vlm import VLM
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import progress


class Captions(Task):
    """Captions of images.

    Yields BLEU-1..4, METEOR, ROUGE_L, CIDEr and SPICE (fractions, as the reference implementation gives them), `nll` in
    nats a token over all reference captions, and `nll_shuffled`, the same with another image's visual tokens: the gap
    says whether the model looks.
    """

    name = "captions"
    counted = "images"
    texts = "captions"
    told = "Captions written for {:,} test pictures."
    likelihoods = ("nll", "nll_shuffled")

    def ask(self, split: Split, limit: int = 0) -> Asked:
        """Returns every image without a prompt, up to the limit, and the reference captions of these."""
        rows = range(min(limit or len(split.images), len(split.images)))
        ids = tuple(split.images.ids[: len(rows)])
        samples = tuple(sample for sample in split.samples if sample.image in rows)
        return Asked(
            split=replace(split, samples=samples),
            ids=ids,
            images=tuple(rows),
            prompts=("",) * len(rows),
            items=ids,
            item_of_text=tuple(rows),
            item_of_sample=tuple(sample.image for sample in samples),
        )

    def count(self, split: Split) -> int:
        """Returns the number of images."""
        return len(split.images)

    def predict(self, inputs: Inputs, vlm: VLM, params: Flat, asked: Asked) -> Predicted:
        """Returns nats a supervised token of the images' captions, and with the image before each instead."""
        split, data = asked.split, inputs.config.data
        visual = encode_images(inputs, vlm, params, split, asked.images)
        encoded = tokenize.encode_split(split, inputs.lm_tokenizer, data.max_tokens, data.eos, **row_options(data))
        scores, rows = {}, {}
        for key, by, shown in (("nll", 0, "captions"), ("nll_shuffled", 1, "captions of other images")):
            images = [(row - by) % len(asked.images) for row in asked.item_of_sample]
            label = f"likelihood of {split.name} {shown}"
            loss, count = likelihoods(inputs, vlm, params, visual, images, encoded, label)
            scores[key] = float(-loss.sum() / max(count.sum(), 1))
            rows |= likelihood_rows(key, -loss, count, asked.item_of_sample, len(asked.items))
        return Predicted(visual, scores, rows)

    def record(
        self, inputs: Inputs, asked: Asked, predicted: Predicted, outputs: Mapping[str, str], method: str
    ) -> list[dict[str, Any]]:
        """Returns COCO's form, [{"image_id", "caption"}]."""
        return [{"image_id": _coco_id(key), "caption": text} for key, text in outputs.items()]

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Compares the captions with the references, by the reference scorers."""
        return compared(inputs, predicted, outputs, self.references(asked), method)

    def references(self, asked: Asked) -> dict[str, Sequence[str]]:
        """Returns the captions by people of each image."""
        return {key: asked.split.references[key] for key in asked.ids}

    def items(self, split: Split, limit: int = 0) -> list[Item] | None:
        """Returns None: the page shows each caption beside the references."""
        return None

    def read_predictions(self, path: Path, found: Any) -> Predictions:
        """Reads COCO's form."""
        if not isinstance(found, list):
            raise ValueError(f"{path}: holds answers to questions, not captions: these are another task's predictions")
        for place, row in enumerate(found):
            said = row if isinstance(row, dict) else {}
            if identifier(said.get("image_id")) is None or not isinstance(said.get("caption"), str):
                raise ValueError(f'{path} [{place}]: needs an "image_id" and a text "caption", not {row!a:.60}')
        return Predictions({identifier(row["image_id"]) or "": row["caption"] for row in found})


def compared(
    inputs: Inputs,
    predicted: Predicted,
    outputs: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    method: str,
) -> Scored:
    """Returns the likelihoods of `predicted`, and what the reference scorers give for texts and people's texts.

    Args:
      inputs: the run's.
      predicted: before a text was generated.
      outputs: id -> text.
      references: id -> texts by people.
      method: of decoding, for the progress line.
    """
    with progress(f"scores of {method}", 1) as advance:
        found = caption_scores.score(outputs, references, java=inputs.config.decode.java)
        rows = caption_rows(outputs, references)
        advance(1)
    return Scored({**predicted.scores, **found}, {**rows, **predicted.rows})


def _coco_id(image_id: str) -> int | str:
    """COCO's own result files hold numbers."""
    return int(image_id) if image_id.isdecimal() and str(int(image_id)) == image_id else image_id


CAPTIONS = Captions()
