"""Instruction files in Alpaca's, LLaVA's and self-instruct's form, as JSON lists and as JSON Lines."""

import functools
import json
import pathlib

from eim_jax.data.datasets.instruct import load_instruct

from .engine import Format
from .plain import as_json, name_of, opens, picture, sound, text_of

ALPACA = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Say hi.", "input": "", "output": "Hi."},
    {"id": 7, "instruction": "<image> What?", "output": "A cat.", "image": "1.jpg"},
]
LLAVA = [
    {"id": "a", "image": "1.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dög."},
        {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]},
    {"id": "b", "images": ["2.jpg"], "conversations": [
        {"from": "human", "value": "Who?\n<image>"}, {"from": "gpt", "value": "Nobody."}]},
    {"id": "c", "conversations": [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "Nothing."}]},
]  # fmt: skip
SELF = [
    {"id": "s1", "name": "n", "instruction": "Add.", "is_classification": False, "instances": [
        {"input": "1", "output": "2"}, {"input": "", "output": "3"}]},
    {"id": "s2", "instruction": "Say.", "instances": [{"input": "a", "output": "b"}]},
]  # fmt: skip
REFUSED = ("system", "history", "video", "videos", "audio", "audios")
MARKERS = ("<video>", "<audio>")


def _files(rows, lines):
    content = b"\n".join(map(as_json, rows)) + b"\n" if lines else as_json(rows)
    return {f"rows.{'jsonl' if lines else 'json'}": content, "im/1.jpg": picture(1), "im/2.jpg": picture(2)}


def _read(source, on_bad, folder: pathlib.Path):
    return load_instruct(folder / source, folder / "im", on_bad=on_bad, cache=folder / "cache")


def _rows(file: pathlib.Path):
    text = text_of(file).replace("\r\n", "\n").replace("\r", "\n")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _pairs(row) -> list[tuple[str, str]] | None:
    """The (question, answer) texts of a good row; None for another. Pictures are looked at elsewhere."""
    if not isinstance(row, dict) or any(row.get(key) for key in REFUSED):
        return None
    if "conversations" in row:
        turns = row["conversations"]
        if not isinstance(turns, list) or not turns or len(turns) % 2 or not all(isinstance(t, dict) for t in turns):
            return None
        if [t.get("from") for t in turns] != ["human", "gpt"] * (len(turns) // 2):
            return None
        texts = [t.get("value") for t in turns]
        pairs = [((question,), answer) for question, answer in zip(texts[::2], texts[1::2], strict=True)]
    elif "instances" in row:
        found = row["instances"]
        if not isinstance(found, list) or not found or not all(isinstance(pair, dict) for pair in found):
            return None
        pairs = [((row.get("instruction"), pair.get("input") or ""), pair.get("output")) for pair in found]
        if any(pair.get("input") not in (None, "") and not isinstance(pair.get("input"), str) for pair in found):
            return None
    else:
        if row.get("input") is not None and not isinstance(row["input"], str):
            return None
        pairs = [((row.get("instruction"), row.get("input") or ""), row.get("output"))]
    return None if not all(_good(*pair, row) for pair in pairs) else [(_joined(q), a) for q, a in pairs]


def _good(question, answer, row) -> bool:
    texts = (*question, answer)
    if not all(sound(text) for text in texts) or not answer.strip() or not question[0].strip():
        return False
    if any(marker in text for marker in MARKERS for text in texts) or "<image>" in answer:
        return False
    count = sum(text.count("<image>") for text in question)
    pictured = row.get("image") is not None or bool(row.get("images"))
    return count <= (1 if pictured else 0) and bool(_joined(question))


def _joined(question) -> str:
    return " ".join(filter(None, (text.replace("<image>", "").strip() for text in question)))


def _image(row):
    """(whether the row's pictures can be meant, the file or None)."""
    image, several = row.get("image"), row.get("images")
    several = [] if several is None else [several] if isinstance(several, str) else several
    if image is not None and not (isinstance(image, str) and image.strip()):
        return False, None
    if not isinstance(several, list) or not all(isinstance(n, str) and n.strip() for n in several) or len(several) > 1:
        return False, None
    names = {*several, *([image] if image is not None else [])}
    return len(names) < 2, next(iter(names), None)


def _check(source, on_bad, folder: pathlib.Path, loaded):
    rows, wanted, seen, dropped = _rows(folder / source), [], set(), 0
    for place, row in enumerate(rows):
        own = name_of(row.get("id")) if isinstance(row, dict) else None
        name = own or str(place)
        name = f"{name}#{place}" if name in seen else name
        seen.add(name)
        pairs = _pairs(row)
        meant, image = _image(row) if pairs else (False, None)
        if not meant or not sound(name) or not (image is None or opens(folder / "im", image)):
            dropped += 1
            continue
        wanted += [(f"rows/{name}/{k}", image, f"Instruction: {q}\nResponse:", a) for k, (q, a) in enumerate(pairs)]
    images = loaded.split.images.names
    found = [
        (s.id, None if s.image is None else images[s.image], s.instruction, s.response) for s in loaded.split.samples
    ]
    assert found == wanted, f"rows are others: {found} for {wanted}"
    assert on_bad == "drop" or not dropped, "rows are missing"


def _form(name, rows, lines, on_bad):
    source = f"rows.{'jsonl' if lines else 'json'}"
    return Format(
        f"{name}{'' if on_bad == 'error' else '-drop'}",
        functools.partial(_files, rows, lines),
        functools.partial(_read, source, on_bad),
        functools.partial(_check, source, on_bad),
        quick=40,
    )


FORMATS = (
    _form("alpaca", ALPACA, False, "error"),
    _form("llava", LLAVA, False, "drop"),
    _form("self-instruct", SELF, False, "drop"),
    _form("instruct-lines", [*ALPACA, *LLAVA, *SELF], True, "error"),
    _form("instruct-lines", [*ALPACA, *LLAVA, *SELF], True, "drop"),
)
