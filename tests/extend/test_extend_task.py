"""A task of open answers with a metric of its own, added from here: it is scored and shown wherever tasks are."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import scored_runs

from eim_jax.data.data_set import DataSet
from eim_jax.data.datasets import DATASETS, load_split
from eim_jax.data.datasets.instruct import prompt
from eim_jax.data.miniature import captioning
from eim_jax.data.samples import Sample, Split
from eim_jax.evaluation.metrics import METRICS
from eim_jax.evaluation.metrics.metric import Metric
from eim_jax.evaluation.tasks import TASKS, task_of
from eim_jax.evaluation.tasks.questions import Questions
from experiments.intervals import difference, score

NUMBERS = ("no", "one", "two", "three", "four")


class Counting(Questions):
    """How many shapes a picture holds, answered in free words."""

    name = "counting"


def same_words(outputs, references):
    """Whether each text is one of its references: rows (right, 1)."""
    return [[int(text.strip().lower() in references[key]), 1] for key, text in outputs.items()]


SAME = Metric("same_words", "same words", 100, 1, +1, "points", tasks=("counting",), measure=same_words)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The data set's own field."""

    pictures: int = 12


def load(data, own, name, cache):
    """A question about each of a few drawn scenes; "two" and "2" are both right."""
    drawn = captioning.load(name, scenes=own.pictures)
    counts = [len(drawn.scenes[key].things) for key in drawn.images.ids]
    asked = prompt("How many shapes are in this picture?")
    samples = tuple(Sample(f"count-{i}", i, asked, NUMBERS[n]) for i, n in enumerate(counts))
    references = {f"count-{i}": (NUMBERS[n], str(n)) for i, n in enumerate(counts)}
    return Split(name, samples, drawn.images, references, task="counting"), ()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(config, work directory, test split) of a run on the added task; some of its answers are made right."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "counting", DataSet("counting", Pictures, load))
        patch.setitem(TASKS, "counting", Counting())
        patch.setitem(METRICS, "same_words", SAME)
        config = scored_runs.few_steps(**{"data.kind": "counting", "data.max_tokens": 40, "data.eval_limit": 10})
        split = load_split(config, "test", workdir)
        patch.setattr("eim_jax.evaluation.scoring.generate_text", answers_of(split))
        scored_runs.run(config, workdir)
        yield config, workdir, split


def answers_of(split):
    """A model that learned in two steps would never be right: this one is for the baseline's three, for EIM's five."""
    right = iter((3, 5))

    def generate_text(inputs, vlm, params, visual, images, prompts, method, label):
        number = next(right)
        assert len(prompts) == 10 and prompts[0].startswith("Instruction: How many") and label == "answers by greedy"
        return [split.references[f"count-{i}"][i % 2].upper() if i < number else "many" for i in range(10)]

    return generate_text


def test_a_split_names_its_task_and_an_unknown_one_is_refused(world):
    split = world[2]
    assert task_of(split) is TASKS["counting"]
    lost = Split("test", split.samples, split.images, task="cuonting")
    with pytest.raises(ValueError, match=r"'cuonting', which is none of captions, scenes, options, .*, counting"):
        task_of(lost)


def test_the_scores_file_holds_the_metric_and_the_likelihoods(world):
    found = scored_runs.scores_of(world[1])
    assert found["baseline"]["greedy"]["same_words"] == 0.3 and found["eim"]["greedy"]["same_words"] == 0.5
    assert found["eim"]["greedy"].keys() == {"nll", "nll_image", "nll_image_shuffled", "same_words", "notes"}
    assert re.search(r"at most 6 tokens; 10 questions [0-9a-f]{8}$", found["eim"]["greedy"]["notes"]["decoding"])


def test_the_predictions_hold_the_texts_and_the_items_their_rows(world):
    said = json.loads((world[1] / "baseline" / "predictions_test.json").read_text())
    assert said["outputs"]["count-9"] == "many" and said["decoding"]["methods"] == ["greedy"]
    items = json.loads((world[1] / "baseline" / "items_test.json").read_text())["greedy"]
    assert items["ids"] == [f"count-{i}" for i in range(10)]
    assert items["same_words"] == [[1.0, 1.0]] * 3 + [[0.0, 1.0]] * 7


def test_the_terminal_the_page_and_its_verdict_show_it(world):
    workdir = world[1]
    assert scored_runs.terminal(workdir)["same words"] == "0.300"
    assert scored_runs.columns_of(workdir)["same words"] == ("30.0", "points")
    assert scored_runs.judged(workdir)[:1] == ["test NLL"] and "same words" in scored_runs.judged(workdir)
    page = (workdir / "report.html").read_text()
    assert "Answers given to 10 test questions." in page and "30.0" in page and "+20.0" in page
    assert page.count("How many shapes are in this picture?") == 10
    # Two questions are answered rightly by EIM alone: "✓ right" stands once for each right answer.
    assert page.count("✓ right</span>") == 3 + 5 and page.count("✗ wrong</span>") == 7 + 5


def test_the_table_over_seeds_shows_it(world):
    assert "| same words | 30.0 | 50.0 | +20.0 |" in scored_runs.over_seeds(world[1])


def test_the_experiments_show_it_with_an_interval_from_its_rows(world, tmp_path):
    config, workdir, _ = world
    found, page = scored_runs.experiment(config, workdir, tmp_path, ("same_words", "nll", "nll_image_gap"))
    assert "same words" in page and "50.0 ± 0.0" in page and "+20.0 [" in page
    spread = score(found["extend-baseline"], "same_words")
    # The middle 95 % of a binomial share of 10 items with p = 0.3, by its own quantiles; whole items apart.
    assert spread.mean == 0.3 and np.allclose(spread.interval, (0.0, 0.6), atol=0.1)
    change = difference(found["extend-baseline"], found["extend-eim"], "same_words")
    np.testing.assert_allclose(change.mean, 0.2)
    assert 0.0 <= change.interval[0] < 0.2 < change.interval[1] <= 0.5


def test_the_example_of_the_docs_is_the_one_here():
    here = Path(__file__)
    page = (here.parents[2] / "docs" / "extend" / "tasks.md").read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    assert first in here.read_text(encoding="utf-8")
