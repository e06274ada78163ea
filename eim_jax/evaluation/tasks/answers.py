"""Answers of a trained arm to questions about images and texts, and their scores: ScienceQA's form and MME's."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from eim_jax.data import tokenize
from eim_jax.data.datasets.mme import YesNoSplit
from eim_jax.data.datasets.scienceqa import QASplit
from eim_jax.data.datasets.scienceqa_prompt import answer_sentence
from eim_jax.data.samples import Sample, Split
from eim_jax.evaluation.metrics import item_statistics, mme, scienceqa
from eim_jax.generation.inference import VisualTokens, encode_images, generate_text, likelihoods, pick
from eim_jax.models.vlm import VLM
from eim_jax.parallel.processes import is_first
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.files import write_json


def evaluate(inputs: Inputs, vlm: VLM, params: Flat, split: Split, directory: Path) -> dict[str, dict]:
    """Answers every question of the test split; {method: scores}. Writes predictions_test*.json, MME's also as files.

    scores: for options "accuracy/<column>" (fractions), "unparsed" (share); for yes or no "mme/<task>", "mme/total"...;
    `nll` in nats a token of the right responses, `nll_image` of those about a picture, `nll_image_shuffled` the same
    with another picture: the gap says whether the model looks.
    """
    decode = inputs.config.decode
    split = replace(split, samples=scored(split, inputs.config.data.eval_limit))
    if isinstance(split, YesNoSplit):
        split = replace(split, questions={sample.id: split.questions[sample.id] for sample in split.samples})
    images, prompts = zip(*((sample.image, sample.instruction) for sample in split.samples), strict=True)
    seen = encode_images(inputs, vlm, params, split, images)
    nll, sums, ids = _nll(inputs, vlm, params, split, seen)
    likeliest = None
    if isinstance(split, QASplit) and decode.answers == "likelihood":
        likeliest = _most_likely(inputs, vlm, params, split, seen)
    scores, parts = {}, {}
    for i, method in enumerate(decode.methods):
        said = generate_text(inputs, vlm, params, seen, images, prompts, method, f"answers by {method}")
        if not is_first():  # what is computed from texts alone is process 0's to compute and write
            scores[method] = dict(nll)
            continue
        outputs = dict(zip((sample.id for sample in split.samples), said, strict=True))
        asked = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        record = {"prompt": {"sha256": asked}, "decoding": asdict(decode)}
        if isinstance(split, QASplit):
            record["prompt"]["form"] = split.form
            scores[method], results = _options(inputs, split, outputs, likeliest)
            parts[method] = {"ids": ids, **item_statistics.options(results, split.problems), **sums}
            record |= {"results": {id_: -1 if found is None else found for id_, found in results.items()}}
        else:
            scores[method] = _yes_no(directory / f"mme_{method}", split, outputs)
            parts[method] = {"ids": ids, **item_statistics.yes_no(split, outputs), **sums}
        scores[method] |= nll
        record["decoding"]["methods"] = [method]
        write_json(directory / f"predictions_test_{method}.json", {**record, "outputs": outputs})
        if i == 0:
            write_json(directory / "predictions_test.json", {**record, "outputs": outputs})
    if is_first():
        item_statistics.write(directory / "items_test.json", parts)
    return scores


def _nll(
    inputs: Inputs, vlm: VLM, params: Flat, split: Split, seen: VisualTokens
) -> tuple[dict[str, float], dict[str, item_statistics.Rows], list[str]]:
    """Nats a token of all responses; where there are two images at least, of those about one, and with another one.

    And each item's share in them, and the items' ids: a question with options, or a picture with its yes/no questions.
    """
    settings, samples = inputs.config.data, split.samples
    encoded = tokenize.encode_split(split, inputs.lm_tokenizer, settings.max_tokens, eos=settings.eos)
    images = [sample.image for sample in samples]
    loss, count = likelihoods(inputs, vlm, params, seen, images, encoded, "likelihood of the responses")
    names = [sample.id for sample in samples]
    if isinstance(split, YesNoSplit):
        names = [f"{split.questions[name].task}/{split.questions[name].image}" for name in names]
    item = {name: place for place, name in enumerate(dict.fromkeys(names))}
    own = np.array([item[name] for name in names])
    found = {"nll": float(-loss.sum() / max(count.sum(), 1))}
    sums = item_statistics.likelihoods("nll", -loss, count, own, len(item))
    places = [place for place, image in enumerate(images) if image is not None]
    rows = list(dict.fromkeys(images[place] for place in places))
    if len(rows) < 2:
        return found, sums, list(item)
    other = dict(zip(rows, [*rows[1:], rows[0]], strict=True))
    swapped, theirs = [other[images[place]] for place in places], pick(encoded, places)
    shuffled, _ = likelihoods(inputs, vlm, params, seen, swapped, theirs, "likelihood with other pictures")
    for name, nats in (("nll_image", -loss[places]), ("nll_image_shuffled", -shuffled)):
        found[name] = float(nats.sum() / max(count[places].sum(), 1))
        sums |= item_statistics.likelihoods(name, nats, count[places], own[places], len(item))
    return found, sums, list(item)


def scored(split: Split, limit: int) -> tuple[Sample, ...]:
    """The samples that eval_limit (0 = all) leaves; of MME's, always both questions of an image."""
    limit += limit % 2 if isinstance(split, YesNoSplit) else 0
    return split.samples[: limit or None]


def _options(
    inputs: Inputs, split: QASplit, outputs: dict[str, str], likeliest: dict[str, int] | None
) -> tuple[dict, dict]:
    """Scores of questions with options, and each one's chosen option (None: the text names none)."""
    decode, problems = inputs.config.decode, {s.id: split.problems[s.id] for s in split.samples}
    chosen = likeliest
    if chosen is None:
        chosen = {id_: scienceqa.read_answer(said, len(problems[id_].choices)) for id_, said in outputs.items()}
    found = scienceqa.score(chosen, problems, unparsed=decode.unparsed, seed=inputs.config.seed)
    return scienceqa.as_fractions(found), chosen


def _most_likely(inputs: Inputs, vlm: VLM, params: Flat, split: QASplit, seen: VisualTokens) -> dict[str, int]:
    """Each question's option whose answer sentence, "The answer is X.", is the most probable."""
    samples, owners = [], []
    for sample in split.samples:
        for k in range(len(split.problems[sample.id].choices)):
            samples.append(Sample(f"{sample.id}/{k}", sample.image, sample.instruction, answer_sentence(k)))
            owners.append((sample.id, k))
    options = Split(split.name, tuple(samples), split.images)
    encoded = tokenize.encode_split(options, inputs.lm_tokenizer, inputs.config.data.max_tokens, eos=False)
    images = [sample.image for sample in samples]
    found, _ = likelihoods(inputs, vlm, params, seen, images, encoded, "likelihood of the options")
    best: dict[str, tuple[float, int]] = {}
    for (id_, k), value in zip(owners, found, strict=True):
        best[id_] = max(best.get(id_, (-np.inf, 0)), (float(value), -k))
    return {id_: -k for id_, (_, k) in best.items()}


def _yes_no(folder: Path, split: YesNoSplit, outputs: dict[str, str]) -> dict:
    """MME's scores of the raw responses, read from the official result files that this writes."""
    folder.mkdir(parents=True, exist_ok=True)
    mme.write_results(folder, split, outputs)
    found = mme.score(mme.read(folder))
    scores = {f"mme/{name}": found[name] for name in ("perception", "cognition", "total")}
    scores |= {f"mme/{task}": of["score"] for task, of in found["tasks"].items()}
    if found["missing"]:
        scores["mme/sum"] = found["partial"]["total"]  # of the subtasks that are there
    return {**scores, "mme/other": found["other"] / found["questions"], "notes": found["notes"]}
