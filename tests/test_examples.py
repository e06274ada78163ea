"""The examples do what they say; the PyTorch one is in tests/parity, the one that reads a run in test_api.py."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "examples"


def example(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_linen_loop_finds_the_own_key_after_two_stages():
    recall = example("linen_loop").main()
    assert recall["all"] > 0.9 and recall["all"] > recall["st"] > 0.05  # chance is 1/512


def test_an_nnx_loop_finds_the_own_key():
    first, last = example("nnx_loop").main()
    assert first < 0.1 and last > 0.9


def test_questions_are_of_what_two_captions_name_and_only_where_one_answer_is_named():
    said = ["A man and his dog.", "A man walks a dog, a cat watches", "Two people near a kitchen"]
    captions = [{"id": i, "image_id": 7, "caption": text} for i, text in enumerate(said)]
    captions += [{"id": i, "image_id": 8, "caption": "A cat beside a dog"} for i in (8, 9)]
    names = [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}]
    rows = example("questions_from_captions").questions({"images": names, "annotations": captions})
    assert [tuple(row.values()) for row in rows] == [
        ("a.jpg", "Is there a person in the picture?", "yes"),
        ("a.jpg", "Which animal is in the picture?", "dog"),
        ("b.jpg", "Is there a person in the picture?", "no"),
    ]


def test_examples_are_short():
    assert {file.name: n for file in FOLDER.glob("*.py") if (n := len(file.read_text().splitlines())) > 105} == {}
