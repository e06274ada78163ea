"""ScienceQA's folder and MME's."""

import functools
import json
import pathlib
import unicodedata

from eim_jax.data.datasets.mme import TASKS, load_mme
from eim_jax.data.datasets.scienceqa import load_scienceqa

from .engine import Format
from .plain import as_json, json_of, name_of, opens, picture, sound, text_of

TEXTS = ("hint", "lecture", "solution", "subject", "grade", "topic", "category", "skill", "image")


def _scienceqa():
    problems = {
        str(i): {
            "question": f"Which {i}?", "choices": ["x", "y", "z"][: 2 + i % 2], "answer": 1, "hint": "h" * (i % 3),
            "image": "image.png" if i % 2 else None, "task": "closed choice", "grade": "grade2",
            "subject": "natural science", "topic": "physics", "category": "c", "skill": "s", "lecture": "L.",
            "solution": "S.", "split": "train",
        }
        for i in range(1, 6)
    }  # fmt: skip
    files = {f"images/train/{i}/image.png": picture(i, "PNG") for i in (1, 3, 5)}
    return {
        "problems.json": as_json(problems),
        "pid_splits.json": as_json({"train": ["5", "3", "1", "2", "4"], "test": ["1"], "val": []}),
        "captions.json": as_json({"captions": {"1": "one", "3": "three"}}),
        **files,
    }


def _read_scienceqa(on_bad, folder: pathlib.Path):
    return load_scienceqa(folder, "train", on_bad=on_bad, cache=folder / "cache")


def _once(pairs):
    found = dict(pairs)
    assert len(found) == len(pairs), "a key stands twice, and the last one was silently taken"
    return found


def _usable(folder, name, record, home, caption) -> bool:
    """Whether a problem is as the authors' files have it."""
    if not isinstance(record, dict) or not sound(name) or not sound(caption):
        return False
    choices, answer = record.get("choices"), record.get("answer")
    if not (sound(record.get("question")) and record["question"].strip() and isinstance(choices, list)):
        return False
    if not all(sound(c) and c.strip() for c in choices) or not 2 <= len(choices) <= 26:
        return False
    if type(answer) is not int or not 0 <= answer < len(choices):
        return False
    if not all(record.get(field) is None or sound(record[field]) for field in TEXTS):
        return False
    if not record.get("image"):
        return True  # nor is "split" read, which says where the picture lies
    if record.get("split") is not None and not sound(record["split"]):
        return False
    where = f"{record.get('split') or home}/{name}/{record['image']}"
    return any(opens(place, where) for place in (folder / "images", folder))


def _check_scienceqa(on_bad, folder: pathlib.Path, loaded):
    text = {name: text_of(folder / name).replace("\r", "\n") for name in ("problems.json", "pid_splits.json")}
    problems, splits = (json.loads(content, object_pairs_hook=_once) for content in text.values())
    captions = json_of(folder / "captions.json")["captions"] if (folder / "captions.json").is_file() else {}
    homes = {
        name_of(i): home
        for home in ("train", "val", "test")
        if isinstance(splits.get(home), list)
        for i in splits[home]
    }
    wanted = []
    for listed in splits["train"]:
        name = name_of(listed)
        if name in problems and _usable(folder, name, problems[name], homes.get(name), captions.get(name, "")):
            wanted += [name] if name not in wanted else []
    found = [sample.id for sample in loaded.split.samples]
    assert found == wanted, f"ids {found} for {wanted}"
    assert on_bad == "drop" or len(found) == len(splits["train"]), "problems are missing"
    for sample in loaded.split.samples:
        record = problems[sample.id]
        assert (sample.image is not None) == bool(record.get("image")), "a picture is missing"
        assert f"Question: {record['question']}" in sample.instruction, "the question is another"
        assert all(
            f"({'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[k]}) {c}" in sample.instruction for k, c in enumerate(record["choices"])
        )
        assert f"The answer is {'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[record['answer']]}." in sample.response, "another answer"


def _mme():
    files = {}
    for task, names, apart in (("existence", ("a", "b"), True), ("OCR", ("x1",), False)):
        for n, name in enumerate(names):
            image, text = (f"{task}/images/", f"{task}/questions_answers_YN/") if apart else (f"{task}/", f"{task}/")
            files[f"{image}{name}.jpg"] = picture(n)
            lines = f"Is it {name}? Please answer yes or no.\tYes\nIs it no {name}? Please answer yes or no.\tNo\n"
            files[f"{text}{name}.txt"] = lines.encode()
    return files


def _read_mme(on_bad, folder: pathlib.Path):
    return load_mme(folder, on_bad=on_bad, cache=folder / "cache")


def _check_mme(on_bad, folder: pathlib.Path, loaded):
    wanted, asked = [], 0
    for task in (task for task in TASKS if (folder / task).is_dir()):
        apart = (folder / task / "images").is_dir()
        texts = folder / task / "questions_answers_YN" if apart else folder / task
        pictures = folder / task / "images" if apart else folder / task
        for file in sorted(texts.glob("*.txt")):
            if file.name.startswith(".") or not file.is_file():
                continue
            asked += 1
            stem = unicodedata.normalize("NFC", file.stem)
            images = [p for p in pictures.iterdir() if unicodedata.normalize("NFC", p.stem) == stem and p.is_file()]
            images = [p.name for p in images if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp")]
            try:
                rows = [line.strip().split("\t") for line in _lines(text_of(file)) if line.strip()]
            except UnicodeDecodeError:
                continue
            answers = [row[1].strip().lower() if len(row) == 2 else "" for row in rows]
            if sorted(answers) != ["no", "yes"] or len(images) != 1 or not opens(pictures, images[0]):
                continue
            if all(sound("".join(row)) for row in rows):
                wanted += [(f"{task}/{images[0]}/{k}", row[0].strip(), answers[k]) for k, row in enumerate(rows)]
    questions = loaded.split.questions
    found = [(s.id, questions[s.id].question, s.response.lower()) for s in loaded.split.samples]
    assert found == wanted, f"questions {found} for {wanted}"
    assert on_bad == "drop" or len(found) == 2 * asked, "questions are missing"


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


FORMATS = tuple(
    Format(
        f"{name}{'' if on_bad == 'error' else '-drop'}",
        files,
        functools.partial(read, on_bad),
        functools.partial(check, on_bad),
        quick=30,
    )
    for name, files, read, check in (
        ("scienceqa", _scienceqa, _read_scienceqa, _check_scienceqa),
        ("mme", _mme, _read_mme, _check_mme),
    )
    for on_bad in ("error", "drop")
)
