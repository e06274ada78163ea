"""Claims about the report page of runs that answer questions: multiple choice (ScienceQA) and yes/no (MME)."""

import html
import json
import re

import pytest
from PIL import Image
from test_report import make_run, page, picture

from eim_jax.evaluation.metrics import caption_overlap
from eim_jax.evaluation.tasks import TASKS, options
from eim_jax.evaluation.tasks.task import Item, Predictions
from eim_jax.reporting.categories import by_category
from eim_jax.reporting.charts import Bars, bars
from eim_jax.reporting.page import write_report
from eim_jax.reporting.questions import SHOWN, questions
from eim_jax.reporting.scores import columns, table, verdict

EVIL = '<img src=x onerror=alert(1)>"&'
CATEGORIES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
NO_COGNITION = "code_reasoning is missing"
ARMS = ("baseline", "eim")


def item(i, **changed):
    fields = {
        "id": str(100 + i),
        "image": picture(str(i)) if i % 2 else None,
        "words": f"Which of these is number {i}?",
        "context": "" if i % 3 else f"They were counted from zero; this is {i}.",
        "options": (f"the {i}th", f"the {i + 1}th", "neither"),
        "answer": i % 3,
    }
    return options.question(**(fields | changed))


def right(q):
    (index,) = [i for i, option in enumerate(q.options) if option.right]
    return index


def qa_scores(shift):
    scores = {"accuracy/Avg": 0.8523 + shift, "accuracy/Avg_low": 0.8412 + shift, "accuracy/Avg_high": 0.863 + shift}
    scores |= {f"accuracy/{name}": 0.7 + 0.02 * i + shift for i, name in enumerate(CATEGORIES)}
    return {"greedy": scores | {"unparsed": 0.004 - shift / 10, "nll": 0.9 - shift, "notes": {"prompt": "QCM-ALE"}}}


def mme_scores(shift):
    scores = {"mme/perception": 1200.5 + shift, "mme/cognition": None, "mme/total": None}
    scores |= {"mme/existence": 180.0 + shift, "mme/OCR": 62.5, "mme/text_translation": 50.25, "mme/other": 0.01}
    return {"greedy": scores | {"notes": {"mme/cognition": NO_COGNITION, "mme/total": NO_COGNITION}}}


def write_arm(workdir, arm, predictions, scores):
    (workdir / arm / "predictions_test.json").write_text(json.dumps(predictions))
    (workdir / arm / "scores_test.json").write_text(json.dumps(scores))


def qa_run(workdir, items, wrong=(1, 4)):
    """The baseline answers the items of `wrong` by the next option, and the item after the last names none."""
    make_run(workdir, steps=4)
    for arm in ARMS:
        results = {q.id: right(q) for q in items}
        if arm == "baseline":
            results |= {items[i].id: (right(items[i]) + 1) % 3 for i in wrong} | {items[-1].id: -1}
        outputs = {k: f"The answer is {chr(65 + v)}. BECAUSE: {arm} says so." for k, v in results.items()}
        outputs |= {k: f"{arm} cannot say." for k, v in results.items() if v == -1}
        said = {"results": results, "outputs": outputs, "prompt": {"form": "QCM-ALE"}, "decoding": {"method": "greedy"}}
        write_arm(workdir, arm, said, qa_scores(0.02 if arm == "eim" else 0.0))
    return items


def yes_no(count):
    for i in range(count):
        for k, answer in enumerate(("Yes", "No")):
            text = f"Is there shape {k} in picture {i}?"
            yield Item(f"existence/{i}.jpg/{k}", picture(str(2 * i + 1)), text, truth=answer)


def cards(workdir):
    """The text of each card, tags removed, in the page's order."""
    source = (workdir / "report.html").read_text(encoding="utf-8")
    found = re.findall(r"<article.*?</article>", source, flags=re.S)
    return [re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", card))) for card in found]


def card_of(workdir, text):
    (found,) = [card for card in cards(workdir) if text in card]
    return found


def test_each_option_is_shown_and_the_right_one_marked(tmp_path):
    items = qa_run(tmp_path, [item(i) for i in range(6)])
    page(tmp_path, {}, items=items, task="options")
    assert len(cards(tmp_path)) == 6
    for q in items:
        shown = card_of(tmp_path, q.question)
        for i, option in enumerate(q.options):
            mark = " ✓ right answer" if i == right(q) else ""
            assert f"({'ABC'[i]}) {option.text}{mark} " in shown
        assert shown.count("✓ right answer") == 1
        assert q.context in shown and ("context" in shown) == bool(q.context)
        assert ("text only" in shown) == (q.image is None)


def test_each_arms_choice_is_marked_right_or_wrong_in_words_above_its_raw_text(tmp_path):
    items = qa_run(tmp_path, [item(i) for i in range(6)])  # item i's right option is i % 3
    page(tmp_path, {}, items=items, task="options")
    said = "The answer is {}. BECAUSE: {} says so."
    shown = card_of(tmp_path, items[1].question)
    assert f"baseline: (C) ✗ wrong {said.format('C', 'baseline')}" in shown
    assert f"eim: (B) ✓ right {said.format('B', 'eim')}" in shown
    shown = card_of(tmp_path, items[5].question)
    assert "baseline: names no option ✗ wrong baseline cannot say." in shown


def test_questions_contexts_options_and_answers_are_escaped(tmp_path):
    items = [item(0, words="Q" + EVIL, context="C" + EVIL, options=("O" + EVIL, "b", "c"), id="<b>7")]
    qa_run(tmp_path, items, wrong=())
    path = tmp_path / "eim" / "predictions_test.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"outputs": {"<b>7": "A" + EVIL * 20}, "prompt": EVIL}))
    found = page(tmp_path, {}, items=items, task="options")
    source = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in source and "<b>" not in source
    for text in ("Q" + EVIL, "C" + EVIL, "O" + EVIL, "A" + EVIL * 20, "prompt: " + EVIL, "<b>7"):
        assert text in found.words


def test_the_interval_stands_beside_its_score_and_is_no_column(tmp_path):
    items = qa_run(tmp_path, [item(i) for i in range(6)])
    found = page(tmp_path, {}, items=items, task="options")
    assert "85.2 [84.1, 86.3]" in found.words and "87.2 [86.1, 88.3]" in found.words
    assert "95 % bootstrap interval" in found.words and "low" not in found.words.split("Every score")[1].split("arm")[0]
    keys = [column.key for column in columns([qa_scores(0.0)])]
    assert keys == [f"accuracy/{name}" for name in ("Avg", *CATEGORIES)] + ["unparsed", "nll"]


def test_bounds_in_the_scorers_notes_are_read_too_and_not_repeated_as_notes():
    scores = {"accuracy/Avg": 0.5, "notes": {"accuracy/Avg_low": 0.4, "accuracy/Avg_high": 0.6, "seed": 1}}
    found = table({"eim": {"greedy": scores}})
    assert found["methods"][0]["rows"][0]["cells"][0]["interval"] == "[40.0, 60.0]"
    assert found["notes"] == ["seed: 1"]


def test_a_page_of_questions_has_no_captioning_columns(tmp_path):
    items = qa_run(tmp_path, [item(i) for i in range(6)])
    found = page(tmp_path, {}, items=items, task="options")
    assert not any(metric.label in found.words for metric in caption_overlap.METRICS)
    assert "Answers given to 6 test questions." in found.words and "run once (seed 3)" in found.words
    assert "caption" not in found.words.split("Configuration")[1].lower().replace("captioning", "")


def test_the_verdict_counts_a_sum_once_and_knows_which_way_is_better():
    found = verdict({"baseline": qa_scores(0.0), "eim": qa_scores(0.02)})[0]
    assert [(row["label"], row["better"]) for row in found["rows"]] == [
        ("accuracy, all questions", 1),
        ("answers that name no option", 1),
        ("test NLL", 1),
    ]
    assert found["rows"][0]["change"] == "+2.0" and found["rows"][0]["interval"] == "[86.1, 88.3]"
    found = verdict({"baseline": mme_scores(0.0), "eim": mme_scores(-7.5)})[0]
    # Cognition has no sum here, so that its one task speaks for itself.
    assert [(row["label"], row["change"], row["better"]) for row in found["rows"]] == [
        ("MME perception", "−7.5", -1),
        ("MME text translation", "±0", 0),
        ("answers neither yes nor no", "±0", 0),
    ]


def test_mme_scores_stand_as_they_are_and_a_null_sum_has_its_reason():
    found = table({"baseline": mme_scores(0.0), "eim": mme_scores(-7.5)})
    cells = dict(zip([column.key for column in found["columns"]], found["methods"][0]["rows"][1]["cells"], strict=True))
    assert list(cells) == [
        f"mme/{k}" for k in ("perception", "cognition", "total", "existence", "OCR", "text_translation", "other")
    ]
    texts = [cell["text"] for cell in cells.values()]
    assert texts == ["1193.0", "–", "–", "172.5", "62.5", "50.2", "1.0"]
    assert found["missing"] == [f"cognition, total: {NO_COGNITION}"]
    assert [column.unit for column in found["columns"][:4]] == ["of 2,000", "of 800", "of 2,800", "of 200"]


def test_where_tasks_are_missing_their_sum_is_judged_and_the_null_sums_have_the_reason():
    scores = {"mme/perception": None, "mme/existence": 150.0, "mme/OCR": 60.0, "mme/sum": 210.0}
    arms = {"baseline": {"greedy": scores | {"notes": {"missing": "count is missing"}}}}
    arms["eim"] = {"greedy": scores | {"mme/sum": 220.0, "mme/OCR": 70.0, "notes": {"missing": "count is missing"}}}
    found = table(arms)
    assert found["missing"] == ["perception: count is missing"] and found["notes"] == []
    (found,) = verdict(arms)
    assert [(row["key"], row["change"]) for row in found["rows"]] == [("mme/sum", "+10.0")]


def test_an_option_chosen_by_likelihood_is_told_from_one_read_in_the_text(tmp_path):
    items = qa_run(tmp_path, [item(0)], wrong=())
    assert "choice: the most likely option" not in page(tmp_path, {}, items=items, task="options").words
    for arm in ARMS:
        path = tmp_path / arm / "predictions_test.json"
        decoding = {"methods": ["greedy"], "answers": "likelihood"}
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"decoding": decoding, "prompt": {"sha256": "ab" * 32}})
        )
    words = page(tmp_path, {}, items=items, task="options").words
    assert "choice: the most likely option" in words and "decoding: methods greedy, answers likelihood" in words
    assert "sha256 abababababab…" in words and "ab" * 7 not in words


def test_bars_are_as_long_as_the_scores_and_whiskers_as_the_interval():
    series = [Bars("baseline", [50.0, None], [(40.0, 60.0), None]), Bars("eim", [100.0, 25.0], [None, None], 1)]
    svg = re.sub(r"\s+", " ", bars(series, ["a", "b"], unit="points", name="t", most=100))

    def widths(style):  # longest first; legend patches and axis lines are drawn in other styles or are shorter
        paths = re.findall(rf'd="([^"]*)"[^>]*style="{style}', svg)
        edges = [[float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)] for path in paths]
        return sorted((max(x) - min(x) for x in edges if x), reverse=True)

    full, quarter = widths(r"fill: var\(--c1\)")[:2]
    assert quarter / full == pytest.approx(0.25, abs=1e-4)
    assert widths(r"fill: var\(--c0\)")[0] / full == pytest.approx(0.5, abs=1e-4)
    assert widths("fill: none; stroke: currentColor; stroke-width: 1.1")[0] / full == pytest.approx(0.2, abs=1e-4)
    assert "baseline: a 50.0, b –; eim: a 100.0, b 25.0" in svg


def test_every_category_and_task_of_any_arm_has_a_bar():
    titles = {chart["title"]: chart["svg"] for chart in by_category({a: qa_scores(0.0) for a in ARMS})["charts"]}
    assert list(titles) == ["accuracy by category"]
    assert all(f">{name} · " in titles["accuracy by category"] for name in ("Avg", *CATEGORIES))
    titles = {chart["title"]: chart["svg"] for chart in by_category({"eim": mme_scores(0.0)})["charts"]}
    assert list(titles) == ["perception tasks", "cognition tasks"]
    assert ">existence<" in titles["perception tasks"] and ">text translation<" in titles["cognition tasks"]
    (chart,) = by_category({"eim": {"greedy": {"accuracy/Avg": 0.5, "accuracy/SOC": None}}})["charts"]
    assert ">SOC" not in chart["svg"] and ">Avg" in chart["svg"]
    assert by_category({"eim": {"greedy": {"CIDEr": 1.0}}}) is None and by_category({"eim": {}}) is None


def test_half_of_the_cards_are_where_arms_differ_evenly_spaced_and_the_page_says_so(tmp_path):
    count, wrong = 10 * SHOWN, range(0, 4 * SHOWN, 2)  # in the last item the baseline names no option
    items = qa_run(tmp_path, [item(i, image=None) for i in range(count)], wrong)
    found = page(tmp_path, {}, items=items, task="options")
    apart = {items[i].id for i in (*wrong, count - 1)}
    shown = [re.search(r"\b1\d\d\b|\b\d{3}\b", card)[0] for card in cards(tmp_path)]
    half = SHOWN // 2
    assert len(shown) == SHOWN and set(shown[:half]) <= apart and not set(shown[half:]) & apart
    assert shown[:half] == [i for i in shown if i in apart][:half] == sorted(shown[:half], key=int)
    differ = len(apart)
    rule = f"{SHOWN} of {count} test questions: first {half} of the {differ} where the arms differ, then {half} of the "
    assert rule + f"{count - differ} others, each evenly spaced in the test split's order" in found.words


def test_where_few_differ_the_others_fill_the_cards():
    items = [item(i, image=None) for i in range(3 * SHOWN)]
    same = {q.id: right(q) for q in items}
    first = Predictions(dict.fromkeys(same, "x"), same, {})
    second = Predictions(first.outputs, same | {items[5].id: (right(items[5]) + 1) % 3}, {})
    found = questions(TASKS["options"], {"baseline": first, "eim": second}, items)["cards"]
    assert len(found) == SHOWN and [card["id"] for card in found if not card["same"]] == [items[5].id]


def test_missing_predictions_are_named(tmp_path):
    items = qa_run(tmp_path, [item(i) for i in range(6)])
    path = tmp_path / "eim" / "predictions_test.json"
    said = json.loads(path.read_text())
    for kind in ("results", "outputs"):
        said[kind]["999"] = said[kind].pop("103")
    path.write_text(json.dumps(said | {"results": said["results"] | {"999": 0}}))
    found = page(tmp_path, {}, items=items, task="options")
    assert "eim: no prediction for 1 of 6 test questions (103)." in found.words
    assert "Missing – eim: predictions for questions that the test split lacks: 1 (999)." in found.words
    assert "eim: no prediction" in card_of(tmp_path, items[3].question)
    path.unlink()
    assert "eim: no predictions_test.json." in page(tmp_path, {}, items=items, task="options").words


def test_a_picture_has_its_two_questions_with_truth_and_responses_read_as_mme_reads_them(tmp_path):
    make_run(tmp_path, steps=4)
    items = list(yes_no(3))
    responses = ["Yes, there is.", "Not at all", "The answer is yes", "No", "no", "yes"]
    outputs = dict(zip([q.id for q in items], responses, strict=True))
    for arm in ARMS:
        write_arm(tmp_path, arm, {"outputs": outputs}, mme_scores(0.0))
    found = page(tmp_path, {}, items=items, task="yes_no")
    shown = cards(tmp_path)
    assert len(shown) == 3 and found.tags.count("img") == 3
    assert all(card.count("Truth: Yes") == card.count("Truth: No") == 1 for card in shown)
    first, second, third = (card_of(tmp_path, f"existence/{i}.jpg") for i in range(3))
    assert "eim: Yes ✓ right Yes, there is." in first and "eim: No ✓ right Not at all" in first
    assert "eim: neither yes nor no ✗ wrong The answer is yes" in second and "eim: No ✓ right No" in second
    assert third.count("✗ wrong") == 4 and "✓ right" not in third
    assert "All 3 test pictures with their questions" in found.words


def test_a_picture_that_cannot_be_given_is_told_from_a_question_without_one(tmp_path):
    items = [item(0), item(1, image=lambda: None), item(2, image=lambda: Image.new("RGB", (8, 8)))]
    found = page(tmp_path, {}, items=qa_run(tmp_path, items, wrong=()), task="options")
    assert found.words.count("text only") == found.words.count("picture not available") == found.tags.count("img") == 1


def test_predictions_of_the_other_kind_or_without_texts_are_errors_that_name_the_file(tmp_path):
    make_run(tmp_path, steps=4)
    with pytest.raises(ValueError, match=r"baseline.predictions_test\.json: holds captions"):
        write_report(tmp_path, TASKS["options"], picture, {}, [item(0)])
    items = qa_run(tmp_path, [item(i) for i in range(6)])
    with pytest.raises(ValueError, match=r"baseline.predictions_test\.json: holds answers"):
        write_report(tmp_path, TASKS["captions"], picture, {})
    write_arm(tmp_path, "eim", {"results": {"100": 1}, "outputs": {"101": "x"}}, {})
    with pytest.raises(ValueError, match=r"eim.predictions_test\.json: 100, 101 in only one"):
        write_report(tmp_path, TASKS["options"], picture, {}, items)
    write_arm(tmp_path, "eim", {"results": {"100": 1}}, {})
    with pytest.raises(ValueError, match=r'eim.predictions_test\.json: holds no "outputs"'):
        write_report(tmp_path, TASKS["options"], picture, {}, items)
    write_arm(tmp_path, "eim", {"results": {"100": 3}, "outputs": {"100": "x"}}, {})
    with pytest.raises(ValueError, match=r"question 100: the prediction is option 3 of 3"):
        write_report(tmp_path, TASKS["options"], picture, {}, items)


@pytest.mark.parametrize("answer", [3, -1])
def test_an_answer_that_is_no_option_is_an_error(answer):
    with pytest.raises(ValueError, match="question 100: the answer"):
        _ = item(0, answer=answer)


def test_a_run_of_questions_that_only_began_still_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "x", "config": {"arms": ["eim"]}}))
    assert "No arm has answers to test questions." in page(tmp_path, {}, items=[item(0)], task="options").words
