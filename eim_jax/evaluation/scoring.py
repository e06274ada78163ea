"""Scores of a trained arm on its test split, by the split's kind; here captions, in evaluate_answers.py questions."""

import json
from dataclasses import replace
from pathlib import Path

from eim_jax.data import tokenize
from eim_jax.data.datasets.mme import YesNoSplit
from eim_jax.data.datasets.scienceqa import QASplit
from eim_jax.data.miniature import captioning
from eim_jax.data.samples import Split
from eim_jax.evaluation.metrics import caption_scores, item_statistics
from eim_jax.evaluation.tasks import answers as answering
from eim_jax.generation.inference import VisualTokens, encode_images, generate_text, likelihoods
from eim_jax.models.vlm import VLM
from eim_jax.parallel.processes import barrier, is_first
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import progress
from eim_jax.utils.files import write_json


def evaluate(inputs: Inputs, vlm: VLM, params: Flat, split: Split, directory: Path) -> dict[str, dict]:
    """Writes predictions_test*.json, items_test.json and scores_test.json of one arm; returns {method: scores}."""
    if isinstance(split, QASplit | YesNoSplit):
        scores = answering.evaluate(inputs, vlm, params, split, directory)
    else:
        scores = _captioning(inputs, vlm, params, split, directory)
    for method, found in scores.items():
        found["notes"] = {**found.get("notes", {}), "decoding": settings_of(inputs, method, split)}
    write_json(directory / "scores_test.json", scores)
    barrier("scores")
    return scores


def _captioning(inputs: Inputs, vlm: VLM, params: Flat, split: Split, directory: Path) -> dict[str, dict]:
    """The scores of generated captions, {method: scores}; writes the predictions.

    scores: BLEU-1..4, METEOR, ROUGE_L, CIDEr, SPICE (fractions, as the reference implementation gives them), `nll` in
    nats a token over all reference captions, `nll_shuffled` the same with another image's visual tokens (the gap says
    whether the model looks), and on the miniature world the F1 of named objects.
    """
    limit = inputs.config.data.eval_limit or len(split.images)
    ids, rows = split.images.ids[:limit], list(range(min(limit, len(split.images))))
    references = {id_: split.references[id_] for id_ in ids}
    seen = encode_images(inputs, vlm, params, split, rows)
    nll, sums = _nll(inputs, vlm, params, split, seen)
    scores, parts = {}, {}
    for i, method in enumerate(inputs.config.decode.methods):
        captions = generate_text(inputs, vlm, params, seen, rows, [""] * len(rows), method, f"captions by {method}")
        results = dict(zip(ids, captions, strict=True))
        answer = [{"image_id": _coco_id(id_), "caption": words} for id_, words in results.items()]
        write_json(directory / f"predictions_test_{method}.json", answer)
        if i == 0:
            write_json(directory / "predictions_test.json", answer)
        scores[method] = dict(nll)
        if not is_first():  # what is computed from texts alone is process 0's to compute and write
            continue
        with progress(f"scores of {method}", 1) as advance:
            scores[method] |= caption_scores.score(results, references, java=inputs.config.decode.java)
            parts[method] = {"ids": list(ids), **item_statistics.captions(results, references), **sums}
            if inputs.config.data.kind == "miniature":
                scores[method] |= captioning.attribute_f1(results, split.scenes)
                parts[method] |= item_statistics.objects(results, split.scenes)
            advance(1)
    if is_first():
        item_statistics.write(directory / "items_test.json", parts)
    return scores


def _nll(
    inputs: Inputs, vlm: VLM, params: Flat, split: Split, seen: VisualTokens
) -> tuple[dict[str, float], dict[str, item_statistics.Rows]]:
    """Nats a supervised token of all captions of the images that were seen, and with the image before each instead;
    and each image's share in both."""
    samples = tuple(sample for sample in split.samples if sample.image in seen.place)
    split = replace(split, samples=samples)
    encoded = tokenize.encode_split(
        split, inputs.lm_tokenizer, inputs.config.data.max_tokens, eos=inputs.config.data.eos
    )
    own, found, sums = [seen.place[sample.image] for sample in samples], {}, {}
    for name, by, with_ in (("nll", 0, "captions"), ("nll_shuffled", 1, "captions of other images")):
        images = [(sample.image - by) % len(seen.place) for sample in samples]
        label = f"likelihood of {split.name} {with_}"
        loss, count = likelihoods(inputs, vlm, params, seen, images, encoded, label)
        found[name] = float(-loss.sum() / max(count.sum(), 1))
        sums |= item_statistics.likelihoods(name, -loss, count, own, len(seen.place))
    return found, sums


def _coco_id(image_id: str) -> int | str:
    """COCO's own result files hold numbers."""
    return int(image_id) if image_id.isdecimal() and str(int(image_id)) == image_id else image_id


def settings_of(inputs: Inputs, method: str, test: Split) -> str:
    """What a score depends on besides the parameters; stored with it."""
    decode, limit = inputs.config.decode, inputs.config.data.eval_limit
    words = {
        "greedy": "greedy",
        "beam": f"{decode.beams} beams ranked by mean log-probability",
        "nucleus": f"nucleus sampling, top_p {decode.top_p:g}, temperature {decode.temperature:g}",
    }[method]
    stop = ", stops at a period" if decode.stop_at_period else ""
    number, what = len(test.images), "images"
    if isinstance(test, QASplit | YesNoSplit):
        number, what = len(test), "questions"
    if isinstance(test, QASplit):
        stop += f", answers {decode.answers}, unparsed {decode.unparsed}"
    number = min(limit or number, number)
    return f"{words}, at most {decode.max_tokens} tokens{stop}; {number:,} {what} {test.fingerprint()[:8]}"


def read_scores(inputs: Inputs, directory: Path, test: Split) -> dict[str, dict] | None:
    """An arm's scores if they were computed with these settings on this test split, else None."""
    path = directory / "scores_test.json"
    if not path.exists():
        return None
    scores = json.loads(path.read_text())
    wanted = {method: settings_of(inputs, method, test) for method in inputs.config.decode.methods}
    found = {method: found.get("notes", {}).get("decoding") for method, found in scores.items()}
    return scores if list(wanted.items()) == list(found.items()) else None
