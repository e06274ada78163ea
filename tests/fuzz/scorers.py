"""Results handed to the three scorers, on their own command lines."""

import contextlib
import io
import json
import pathlib

from eim_jax.evaluation.metrics import caption_scores, mme, scienceqa

from .engine import Format
from .plain import as_json, json_of, name_of, sound, text_of
from .questions import _once, _scienceqa


def _said(main, *arguments) -> dict:
    """What a scorer prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main([str(argument) for argument in arguments])
    return json.loads(said.getvalue())


def _captions():
    results = [{"image_id": i, "caption": f"a dog {i} runs"} for i in (3, 5, 9)]
    truth = [
        {"id": 10 * i + k, "image_id": i, "caption": f"A dog {i} runs fast {k}."} for i in (3, 5, 9) for k in (0, 1)
    ]
    return {
        "results.json": as_json(results),
        "captions.json": as_json({"images": [{"id": i} for i in (3, 5, 9)], "annotations": truth}),
    }


def _read_captions(folder: pathlib.Path):
    return _said(
        caption_scores.main,
        "--no-java",
        "--results",
        folder / "results.json",
        "--annotations",
        folder / "captions.json",
    )


def _check_captions(folder: pathlib.Path, found):
    results, truth = json_of(folder / "results.json"), json_of(folder / "captions.json")["annotations"]
    ids = [_key(row) for row in results]
    assert len(set(ids)) == len(ids) and all(sound(row["caption"]) for row in results), "results that cannot be meant"
    with_truth = {_key(row) for row in truth}
    assert set(ids) <= with_truth, "a result without a reference was scored"
    assert found["notes"]["images"] == f"{len(ids)} results, of {len(with_truth)} images with references"
    for metric in ("Bleu_1", "Bleu_4", "ROUGE_L"):
        assert 0 <= found[metric] <= 1 + 1e-9, f"{metric} {found[metric]}"
    said = {_key(row): row["caption"] for row in results}
    exact = [_key(row) for row in truth if said.get(_key(row)) == row["caption"]]
    if set(ids) <= set(exact) and all(len(said[name].split()) > 3 for name in ids):
        assert found["ROUGE_L"] == 1, "captions that equal a reference"


def _key(row):
    """A text and a number are two ids, as for the official scorer; 5.0 is 5."""
    return isinstance(row["image_id"], str), name_of(row["image_id"])


def _answers():
    files = {name: content for name, content in _scienceqa().items() if name in ("problems.json", "pid_splits.json")}
    return {"predictions.json": as_json({"results": {"5": 1, "3": 0, "1": 1, "2": None, "4": -1}}), **files}


def _read_answers(folder: pathlib.Path):
    return _said(scienceqa.main, "--predictions", folder / "predictions.json", "--data", folder, "--split", "train")


def _check_answers(folder: pathlib.Path, found):
    given, problems, splits = (
        json.loads(text_of(folder / name).replace("\r", "\n"), object_pairs_hook=_once)
        for name in ("predictions.json", "problems.json", "pid_splits.json")
    )
    given = given.get("results", given)
    ids = [name_of(i) for i in splits["train"]]
    assert sorted(ids) == sorted(set(ids)) == sorted(given), "predictions of other problems"
    assert all(v is None or (type(v) is int and v < len(problems[k]["choices"])) for k, v in given.items())
    right = sum(given[name] == problems[name]["answer"] for name in ids)
    assert abs(found["Avg"] - 100 * right / len(ids)) < 1e-9, f"{found['Avg']} for {right} of {len(ids)}"
    assert found["unparsed"] == sum(given[name] in (None, -1) for name in ids), "unparsed"


def _yes_no():
    lines = "".join(f"{i}.jpg\tIs it {k}?\t{k}\t{said}\n" for i in "ab" for k, said in (("Yes", "Yes."), ("No", "Yes")))
    return {"existence.txt": lines.encode(), "OCR.txt": lines.encode()}


def _read_yes_no(folder: pathlib.Path):
    return _said(mme.main, "--results", folder)


def _check_yes_no(folder: pathlib.Path, found):
    files = [file for file in folder.iterdir() if file.suffix == ".txt"]
    assert {file.stem for file in files} == set(found["tasks"]), "another set of subtasks"
    total = 0.0
    for file in files:
        text = text_of(file).replace("\r\n", "\n").replace("\r", "\n")
        rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
        assert all(len(row) == 4 for row in rows) and len(rows) % 2 == 0, "a line of another form was scored"
        right = [_yes_or_no(row[3]) == row[2].lower() for row in rows]
        pairs = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
        total += 100 * sum(right) / len(right) + 100 * sum(pairs) / len(pairs)
    assert abs(found["partial"]["total"] - total) < 1e-9, f"{found['partial']['total']} for {total}"


def _yes_or_no(said: str) -> str:
    start = said.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


FORMATS = (
    Format("caption-scores", _captions, _read_captions, _check_captions, quick=30),
    Format("scienceqa-scores", _answers, _read_answers, _check_answers, quick=30),
    Format("mme-scores", _yes_no, _read_yes_no, _check_yes_no, quick=100),
)
