"""The rows that test items add to a score give the score of the whole set, by the scorers themselves."""

import numpy as np

from eim_jax.data.miniature import captioning, chat, qa
from eim_jax.evaluation.metrics import caption_scores, metric_of, mme, scienceqa
from eim_jax.evaluation.metrics.accuracy import option_rows
from eim_jax.evaluation.metrics.caption_overlap import caption_rows
from eim_jax.evaluation.metrics.likelihood import likelihood_rows
from eim_jax.evaluation.metrics.mme_scores import yes_no_rows
from eim_jax.evaluation.metrics.named_objects import object_rows


def _captions(number=12):
    split = captioning.load("test", scenes=number)
    ids = list(split.images.ids)
    said = {key: split.references[ids[(i + i % 3) % number]][0] for i, key in enumerate(ids)}
    said[ids[3]] = "red"  # shorter than any reference, without a 4-gram
    return split, said


def _score(metric, rows):
    return metric_of(metric).total(rows)


def test_caption_rows_add_up_to_the_scorers_bleu_cider_and_f1():
    split, said = _captions()
    references = {key: split.references[key] for key in said}
    rows, whole = caption_rows(said, references), caption_scores.score(said, references, java=False)
    for metric in ("Bleu_4", "CIDEr"):
        np.testing.assert_allclose(_score(metric, rows[metric]), whole[metric], rtol=1e-4)
    f1 = captioning.attribute_f1(said, split.scenes)["shape_colour_f1"]
    np.testing.assert_allclose(_score("shape_colour_f1", object_rows(said, split.scenes)["shape_colour_f1"]), f1)


def test_bleu_of_resampled_items_is_the_scorers_bleu_of_the_resampled_set():
    split, said = _captions()
    keys = list(said)
    draw = np.random.default_rng(0).integers(len(keys), size=len(keys))
    rows = np.asarray(caption_rows(said, split.references)["Bleu_4"])
    again = {f"{i}": said[keys[k]] for i, k in enumerate(draw)}
    whole = caption_scores.score(again, {f"{i}": split.references[keys[k]] for i, k in enumerate(draw)}, java=False)
    weights = np.bincount(draw, minlength=len(keys))
    np.testing.assert_allclose(metric_of("Bleu_4").value(weights @ rows), whole["Bleu_4"], rtol=1e-6)


def test_question_rows_add_up_to_the_official_accuracy():
    split = qa.load("test", problems=20)
    chosen = {key: (i % 2 if i % 5 else None) for i, key in enumerate(split.problems)}
    rows = option_rows(chosen, split.problems)
    whole = scienceqa.as_fractions(scienceqa.score(chosen, split.problems))
    for metric in ("accuracy/Avg", "accuracy/IMG"):
        np.testing.assert_allclose(_score(metric, rows[metric]), whole[metric])


def test_yes_no_rows_add_up_to_mme(tmp_path):
    split = chat.load_yes_no()
    said = {key: ("yes", "no", "no", "perhaps")[i % 4] for i, key in enumerate(split.questions)}
    mme.write_results(tmp_path, split, said)
    right = {key: mme.read_answer(said[key]) == question.answer.lower() for key, question in split.questions.items()}
    whole, rows = mme.score(mme.read(tmp_path)), yes_no_rows(split.questions, right)
    for task, found in whole["tasks"].items():
        np.testing.assert_allclose(_score(f"mme/{task}", rows[f"mme/{task}"]), found["score"])
    np.testing.assert_allclose(_score("mme/sum", rows["mme/sum"]), whole["partial"]["total"])


def test_likelihood_rows_are_sums_over_an_items_samples():
    rows = likelihood_rows("nll", np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 5.0]), np.array([1, 0, 1]), 3)
    assert rows == {"nll": [[2.0, 1], [5.0, 7], [0.0, 0]]}
    np.testing.assert_allclose(_score("nll", rows["nll"]), 7 / 8)
    assert np.isnan(metric_of("nll").value(np.zeros((2, 2)))).all()
