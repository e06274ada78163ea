"""The page's curves of scores while training, and what it says of a model that does not look at its pictures."""

import json
import re

import numpy as np
import pytest
from test_report import make_run, page

from eim_jax.reporting.blind import ignored_pictures
from eim_jax.utils.files import Damaged


def likelihoods(rise, spread, pictures=60, seed=0):
    """Items whose NLL rises by `rise` nats a token with another picture, give or take `spread`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, 14, pictures)
    own = rng.normal(2.0, 0.3, pictures) * tokens
    other = own + rng.normal(rise, spread, pictures) * tokens
    return {
        "ids": [str(i) for i in range(pictures)],
        "nll": [[float(n), int(t)] for n, t in zip(own, tokens, strict=True)],
        "nll_shuffled": [[float(n), int(t)] for n, t in zip(other, tokens, strict=True)],
    }


def test_a_model_is_said_to_ignore_its_pictures_where_another_one_costs_it_nothing():
    for rise, spread, said in ((0.0, 0.05, 1), (-0.1, 0.05, 1), (0.1, 0.05, 0), (0.05, 0.5, 1), (0.3, 0.5, 0)):
        found = ignored_pictures("eim", {"greedy": likelihoods(rise, spread)}, None)
        assert len(found) == said, (rise, spread, found)
    assert "its NLL rises by 0.00" in ignored_pictures("eim", {"greedy": likelihoods(0.0, 0.001)}, None)[0]
    # Of questions those about a picture alone count.
    both = likelihoods(0.0, 0.01) | {
        key.replace("nll", "nll_image"): rows for key, rows in likelihoods(0.5, 0.1).items() if key.startswith("nll")
    }
    assert ignored_pictures("eim", {"greedy": both}, None) == []
    assert ignored_pictures("eim", {}, None) == []


def test_few_different_texts_about_many_pictures_are_counted():
    same = {str(i): f"a cat {i % 2}" for i in range(40)}
    assert ignored_pictures("eim", {}, same) == ["eim wrote 2 different texts about 40 pictures."]
    assert ignored_pictures("eim", {}, {str(i): f"a cat {i % 3}" for i in range(40)}) == []
    assert ignored_pictures("eim", {}, dict(list(same.items())[:10])) == []  # too few to tell
    assert ignored_pictures("eim", {}, None) == []  # answers may be equal


def test_the_page_shows_the_curves_the_kept_step_and_the_warning(tmp_path):
    _, references = make_run(tmp_path, arms=("eim",))
    folder = tmp_path / "eim"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[::5]:
        row |= {"eval/nll": 2.5 - row["step"] / 100, "train/nll": 2.0, "eval/CIDEr": 0.5, "eval/Bleu_1": 0.1}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = json.loads((folder / "run.json").read_text())
    run["stages"][-1]["kept"] = {"step": 30, "metric": "eval/nll", "value": 2.2}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "items_test.json").write_text(json.dumps({"greedy": likelihoods(0.0, 0.01)}))
    page(tmp_path, references)
    shown = (tmp_path / "report.html").read_text()
    titles = re.findall(r"<figcaption>(.*?) <span>(.*?)</span>", shown)
    assert ("NLL", "held out 2.200, trained on 2.000") in titles and ("CIDEr", "held out 50.0") in titles
    assert not any(title == "BLEU-1" for title, _ in titles)  # what BLEU-4 sums up is left to the table
    assert "kept: step 30, by eval/nll 2.2" in shown
    assert "Does it look at its pictures?" in shown and "as well with another picture as with the right one" in shown
    (folder / "items_test.json").write_text(json.dumps({"greedy": {"nll": [[1.0, 2]], "nll_shuffled": [[1.0]]}}))
    with pytest.raises(Damaged, match=r"greedy\.nll_shuffled"):
        page(tmp_path, references)
