"""Claims about the report page, on synthetic artifacts of a run."""

import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from eim_jax.evaluation.tasks import TASKS
from eim_jax.reporting.gallery import GALLERY, mark
from eim_jax.reporting.page import write_report
from eim_jax.reporting.scores import table, verdict

COLOURS = {"red": "#d03030", "green": "#30a040", "blue": "#3050d0", "yellow": "#e0c020"}
SHAPES = ("circle", "square", "triangle")
PLAN = {
    "baseline": [("base", {"base": 1.0}, [("st/.*", 4, 1_180_416), ("lm/.*", 52, 466_944)])],
    "eim": [
        ("st", {"st": 1.0}, [("st/.*", 4, 1_180_416)]),
        ("lm", {"lm": 1.0}, [("lm/.*", 52, 466_944)]),
        (
            "ie",
            {"base": 1.0, "ie": 0.5},
            [("visual/prompt/.*", 20, 98_304), ("st/.*", 4, 1_180_416), ("lm/.*", 52, 466_944)],
        ),
    ],
}
TOTAL = 2_345_678
SCORES = {"Bleu_1": 0.612, "Bleu_2": 0.497, "Bleu_3": 0.391, "Bleu_4": 0.297, "METEOR": 0.271, "ROUGE_L": 0.542}
SCORES |= {"CIDEr": 1.083, "SPICE": None, "nll": 1.104, "shape_colour_f1": 0.62, "nll_shuffled": 2.5}
NO_SPICE = "SPICE needs Java, which is not on this machine"


def scene(image_id):
    random = np.random.default_rng(int(image_id))
    return [(str(random.choice(list(COLOURS))), str(random.choice(SHAPES))) for _ in range(2)]


def picture(image_id):
    image = Image.new("RGB", (32, 32), "#cfd8dc")
    draw = ImageDraw.Draw(image)
    for i, (colour, shape) in enumerate(scene(image_id)):
        x, y = 3 + 14 * i, 5 + 10 * i
        box = (x, y, x + 11, y + 11)
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x, y + 11), (x + 11, y + 11), (x + 5, y)], fill=COLOURS[colour])
    return image


def captions(image_id):
    (c1, s1), (c2, s2) = scene(image_id)
    return [
        f"a {c1} {s1} left of a {c2} {s2}",
        f"a {c2} {s2} and a {c1} {s1} on grey",
        f"two shapes: {c1} {s1}, {c2} {s2}.",
    ]


def caption(arm, image_id):
    random = np.random.default_rng([int(image_id), len(arm)])
    text = captions(image_id)[0]
    return (
        text.replace(scene(image_id)[0][0], "purple") if random.random() < (0.5 if arm == "baseline" else 0.2) else text
    )


def metrics(stages, steps, every):
    random = np.random.default_rng(len(stages))
    for index, (name, losses, _) in enumerate(stages):
        for step in range(0, steps, every):
            fade = math.exp(-3 * step / steps)
            row = {"stage": name, "stage_index": index, "step": step, "epoch": step / 100, "lr/default": 2e-5}
            for k, term in enumerate(losses):
                row[f"loss/{term}"] = 1.2 + k + 4 * fade + 0.15 * random.normal()
                if term != "base":
                    row[f"queue/{term}/recall1"] = float(np.clip(0.8 * (1 - fade) + 0.03 * random.normal(), 0, 1))
                    row[f"queue/{term}/rank"] = 1 + 900 * fade * math.exp(0.1 * random.normal())
                    row[f"queue/{term}/similarity"] = 0.3 + 0.4 * (1 - fade) + 0.01 * random.normal()
                    row[f"queue/{term}/effective"] = 20 + 3000 * fade
            row["loss"] = sum(weight * row[f"loss/{term}"] for term, weight in losses.items())
            yield row | {"examples_per_second": 812.0, "data_wait": 0.012}


def make_run(workdir, arms=("baseline", "eim"), pictures=6, steps=40, every=2):
    workdir.mkdir(parents=True, exist_ok=True)
    ids = [str(9 + 7 * i) for i in range(pictures)]
    config = {"arms": list(arms), "seed": 3, "batch": 40, "queue": {"tau": 0.07, "similarity": "cosine"}}
    run = {"command": "python -m eim_jax.main --config=configs/miniature.py --workdir=runs/first", "config": config}
    run |= {
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        "machine": {"device": "cpu", "cores": 2},
        "seconds": 1234.5,
    }
    run |= {"started": "2026-11-20 14:02 UTC", "finished": "2026-11-20 14:23 UTC"}
    (workdir / "run.json").write_text(json.dumps(run))
    for n, arm in enumerate(arms):
        folder = workdir / arm
        folder.mkdir(exist_ok=True)
        stages = [
            {
                "name": name,
                "losses": losses,
                "trained": [dict(zip(("pattern", "leaves", "params"), row, strict=True)) for row in trained],
            }
            | {
                "trained_params": sum(row[2] for row in trained),
                "total_params": TOTAL,
                "steps": steps,
                "epochs": 8,
                "batch": 40,
            }
            | {
                "seconds": 92.4,
                "examples_per_second": 0.4137 if len(trained) > 1 else 812.3,
                "peak_memory_bytes": None,
                "data_wait": 0.012,
                "frozen_unchanged": True,
            }
            for name, losses, trained in PLAN[arm]
        ]
        info = {"arm": arm, "description": f"What {arm} does.", "total_params": TOTAL, "stages": stages}
        (folder / "run.json").write_text(json.dumps(info))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics(PLAN[arm], steps, every)))
        predictions = [{"image_id": int(key), "caption": caption(arm, key)} for key in ids]
        (folder / "predictions_test.json").write_text(json.dumps(predictions))
        better = {k: v if v is None else v + (-0.05 if k == "nll" else 0.03) * n for k, v in SCORES.items()}
        scored = {"beam": better | {"notes": {"SPICE": NO_SPICE}}}
        scored["greedy"] = {k: None if v is None else v * 0.9 for k, v in scored["beam"].items() if k != "notes"}
        scored["greedy"]["notes"] = {"SPICE": NO_SPICE}
        (folder / "scores_test.json").write_text(json.dumps(scored))
    return ids, {key: captions(key) for key in ids}


class Page(html.parser.HTMLParser):
    """Collects text, attributes and ids; fails on a tag that is not closed in order."""

    VOID = frozenset(("meta", "link", "br", "img", "input", "hr"))

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))


def page(workdir, references, images=picture, items=None, task="captions"):
    path = write_report(workdir, TASKS[task], images, references, items)
    assert path == workdir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_every_arm_score_stage_and_caption_is_on_a_balanced_page(tmp_path):
    ids, references = make_run(tmp_path)
    found = page(tmp_path, references)
    for arm in ("baseline", "eim"):
        for key in ids:
            assert caption(arm, key) in found.words
    for text in (
        "29.7",
        "32.7",
        "+3.0",
        "108.3",
        "1.104",
        "1.054",
        "−0.050",
        "62.0",
        "65.0",
        "beam search",
        "greedy search",
    ):
        assert text in found.words, text
    for text in (
        *(text for texts in references.values() for text in texts),
        "visual/prompt/.*",
        "0.5 × loss_IE",
        "✓ bit-identical",
        "jax 0.10.2",
        "1:32",
    ):
        assert text in found.words, text
    assert found.words.count("✓ bit-identical") == 4 and found.words.count(" 0.41 ") == 2 == found.words.count(" 812 ")
    assert "--config=configs/miniature.py --workdir=runs/first" in found.words
    assert "run once (seed 3)" in found.words


def test_every_loss_and_queue_diagnostic_has_a_labelled_chart(tmp_path):
    _, references = make_run(tmp_path)
    file = tmp_path / "eim" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if json.loads(line)["stage"] == "lm")
    begun = {"stage": "lm", "stage_index": 1, "step": 0, "loss": 8.6, "loss/lm": 8.6}
    begun |= {"queue/lm/floor": 8.644, "queue/lm/chance": 8.7}
    file.write_text("\n".join([*lines[:place], json.dumps(begun), *lines[place:]]) + "\n")
    found = page(tmp_path, references)
    assert re.search(r"8.6 → \S+ · chance 8.7 · own key as query 8.64", found.words)
    assert "; chance: 8.7; own key as query: 8.644" in (tmp_path / "report.html").read_text()  # read aloud
    # st, lm: 1 loss + 4 diagnostics; ie: sum, 2 losses, 4 diagnostics; baseline: 1; both arms' loss_base together: 1
    assert found.tags.count("svg") == 5 + 5 + 7 + 1 + 1
    for title in ("loss_ST", "recall@1 in K_e", "right key's rank in K_b", "effective negatives, K_t"):
        assert title in found.words
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in found.attributes if name == "href"}
    assert used <= set(ids)


def test_the_page_fetches_nothing(tmp_path):
    _, references = make_run(tmp_path)
    page(tmp_path, references)
    source = (tmp_path / "report.html").read_text()
    assert "://" not in source and "<script" not in source and "@import" not in source
    sources = re.findall(r'(?:src|href)="([^"#]*)', source)
    assert all(value == "" or value.startswith("data:image/png;base64,") for value in sources)


def test_all_text_from_outside_is_escaped(tmp_path):
    evil = '<img src=x onerror=alert(1)>"&'
    ids, references = make_run(tmp_path, arms=("baseline", "eim"))
    references[ids[0]] = [evil]
    path = tmp_path / "eim" / "predictions_test.json"
    path.write_text(json.dumps([{"image_id": int(ids[0]), "caption": evil}]))
    for path in (tmp_path / "run.json", tmp_path / "eim" / "run.json", tmp_path / "eim" / "metrics.jsonl"):
        text = (
            path.read_text()
            .replace("runs/first", "<b>")
            .replace("st/.*", "<i>st")
            .replace('"stage": "ie"', '"stage": "<u>"')
        )
        path.write_text(text)
    found = page(tmp_path, references)
    source = (tmp_path / "report.html").read_text()
    assert not re.search(r"<img src=x|<b>|<i>st|<u>", source)
    assert evil in found.words and "<i>st" in found.words and "<u>" in found.words


def test_a_missing_score_is_a_dash_with_its_reason(tmp_path):
    _, references = make_run(tmp_path)
    found = page(tmp_path, references)
    assert "–" in found.words and f"SPICE: {NO_SPICE}" in found.words
    assert ("title", NO_SPICE) in found.attributes


def test_a_captioning_run_has_all_captioning_columns_in_order_even_where_null(tmp_path):
    _, references = make_run(tmp_path)
    page(tmp_path, references)
    heads = re.findall(r'<th scope="col">([^<]+)<span class="unit">', (tmp_path / "report.html").read_text())
    captioning = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE"]
    assert heads == [*captioning, "test NLL", "test NLL, shuffled pictures", "shape colour F1"]


def test_what_the_scorer_notes_is_shown_once():
    one = {"Bleu_4": 0.3, "SPICE": None, "notes": {"SPICE": "no Java", "tokeniser": "PTB rules"}}
    found = table({"baseline": {"g": one}, "eim": {"g": one | {"notes": one["notes"] | {"empty": "2 results"}}}})
    assert "SPICE: no Java" in found["missing"]
    assert found["notes"] == ["empty: 2 results (eim, g)", "tokeniser: PTB rules"]


def test_scores_that_are_missing_for_one_reason_share_a_line():
    one = {"Bleu_4": 0.3, "METEOR": None, "SPICE": None, "notes": {"METEOR": "no Java", "SPICE": "no Java"}}
    assert "METEOR, SPICE: no Java" in table({"eim": {"g": one}})["missing"]


def test_worse_is_said_as_plainly_as_better():
    base, arm = {"Bleu_4": 0.30, "CIDEr": 1.0, "nll": 1.1}, {"Bleu_4": 0.31, "CIDEr": 1.0, "nll": 1.2}
    words = verdict({"baseline": {"beam": base}, "eim": {"beam": arm}})[0]["words"]
    assert words == (
        "eim against the baseline: better in 1 of 3 scores (BLEU-4), worse in 1 of 3 scores (test nll), "
        "equal in 1 of 3 scores (CIDEr)."
    ).replace("nll", "NLL")
    words = verdict({"baseline": {"beam": arm}, "eim": {"beam": {"Bleu_4": 0.2, "CIDEr": 0.9, "nll": 1.3}}})[0]["words"]
    assert words == "eim is worse than the baseline in all 3 scores."


def test_differences_agree_with_the_shown_figures():
    rows = table({"baseline": {"g": {"Bleu_4": 0.30049}}, "eim": {"g": {"Bleu_4": 0.30051}}})["methods"][0]["rows"]
    shown = [row["cells"][3] for row in rows]
    assert [cell["text"] for cell in shown] == ["30.0", "30.1"] and shown[1]["change"] == "+0.1"


def test_likelihood_with_a_wrong_picture_is_not_judged():
    rows = verdict(
        {"baseline": {"g": {"nll": 1.0, "nll_shuffled": 2.0}}, "eim": {"g": {"nll": 0.9, "nll_shuffled": 3.0}}}
    )
    assert [row["better"] for row in rows[0]["rows"]] == [1, None]


def test_a_single_arm_needs_no_baseline(tmp_path):
    _, references = make_run(tmp_path, arms=("eim",))
    found = page(tmp_path, references)
    assert "no baseline arm beside another" in found.words and "29.7" in found.words
    assert not any("differs" in (value or "") for name, value in found.attributes if name == "class")


def test_an_interrupted_run_says_so_and_where(tmp_path):
    _, references = make_run(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"finished": None, "seconds": None}))
    for name in ("run.json", "scores_test.json", "predictions_test.json"):
        (tmp_path / "eim" / name).unlink()
    path = tmp_path / "eim" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:25]) + '{"stage": "l')
    found = page(tmp_path, references)
    assert "has not finished" in found.words and "eim: last record in stage lm, step 8; no test scores" in found.words
    assert "No comparison yet" in found.words


def test_scores_by_other_settings_stand_beside_the_arms_own(tmp_path):
    _, references = make_run(tmp_path)
    before = page(tmp_path, references)
    own = json.loads((tmp_path / "eim" / "scores_test.json").read_text())
    other = {"beam": own["beam"] | {"CIDEr": 9.87, "notes": {"decoding": "7 beams"}}}
    folder = tmp_path / "eim" / "evals" / "beam-0123abcd"
    folder.mkdir(parents=True)
    (folder / "scores_test.json").write_text(json.dumps(other))
    found = page(tmp_path, references)
    assert "beam search by other settings (evals/beam-0123abcd)" in found.words and "7 beams" in found.words
    assert "987.0" in found.words and "987.0" not in before.words
    verdict = before.words.split("Scores on the test split")[1][:200]
    assert verdict in found.words  # the arms are compared by their own


def test_a_run_that_only_began_still_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "x", "config": {"arms": ["eim"]}}))
    assert "eim: not started" in page(tmp_path, {}).words


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        write_report(tmp_path, TASKS["captions"], picture, {})


def test_values_that_are_not_finite_leave_a_gap_and_are_counted(tmp_path):
    _, references = make_run(tmp_path)
    path = tmp_path / "eim" / "metrics.jsonl"
    path.write_text(re.sub(r'"loss/st": [\d.]+', '"loss/st": null', path.read_text(), count=3))
    assert "3 not finite" in page(tmp_path, references).words


def test_the_gallery_is_evenly_spaced_in_order_of_id(tmp_path):
    ids, references = make_run(tmp_path, arms=("eim",), pictures=3 * GALLERY, steps=2)
    asked = []
    page(tmp_path, references, lambda key: asked.append(key))
    assert asked == ids[::3]


def test_pictures_survive_in_the_page_and_a_missing_one_is_said(tmp_path):
    ids, references = make_run(tmp_path, arms=("eim",), steps=2)
    found = page(tmp_path, references, lambda key: None if key == ids[0] else picture(key))
    assert found.tags.count("img") == len(ids) - 1 and found.words.count("picture not available") == 1


def test_a_large_picture_is_embedded_small(tmp_path):
    _, references = make_run(tmp_path, arms=("eim",), pictures=1, steps=2)
    page(tmp_path, references, lambda key: Image.new("RGBA", (2000, 1000), "red"))
    data = re.search(r"data:image/jpeg;base64,([^\"]+)", (tmp_path / "report.html").read_text())[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 160)


def test_words_that_differ_and_words_in_no_reference_are_marked():
    words = mark("A red circle, near a dog.", "a blue circle near a cat", {"a", "red", "circle"})
    assert [word["text"] for word in words if word["differs"]] == ["red", "dog."]
    assert [word["text"] for word in words if word["absent"]] == ["near", "dog."]
    assert not any(word["absent"] for word in mark("a dog", None, None))
