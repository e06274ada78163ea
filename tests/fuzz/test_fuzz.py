"""A short run of the fuzz: the same inputs each time, of every format; `python -m tests.fuzz` runs for hours."""

import pathlib

import pytest

from . import engine, mutations
from .formats import FORMATS
from .plain import as_json


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_mutated_input_is_read_correctly_or_refused_clearly(form, tmp_path):
    valid, tally = form.files(), engine.Tally()
    assert engine.outcome(form, valid).kind == engine.CORRECT, "the valid input itself"
    engine.explore(form, form.quick, None, tally, tmp_path)
    assert tally.tried >= form.quick // 2
    told = [file.read_text()[:2000] for folder in tally.kept.values() for file in folder.glob("outcome.txt")]
    assert not tally.counts[engine.ELSE], "\n\n".join([engine.table({form.name: tally}), *told])


def _form(read, check=lambda folder, found: None):
    return engine.Format("x", lambda: {"some.json": as_json({"a": 1})}, read, check)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda folder: 1, engine.CORRECT),
        (lambda folder: _raise(ValueError(f"{folder / 'some.json'}: a is 2")), engine.CLEAR),
        (lambda folder: _raise(FileNotFoundError(2, "No such file", str(folder / "some.json"))), engine.CLEAR),
        (lambda folder: _raise(SystemExit("error: some.json is empty")), engine.CLEAR),
        (lambda folder: _raise(ValueError("it is wrong")), engine.ELSE),
        (lambda folder: _raise(ValueError("some.json: invalid literal for int()")), engine.ELSE),
        (lambda folder: _raise(KeyError("a")), engine.ELSE),
        (lambda folder: _raise(MemoryError()), engine.ELSE),
    ],
)
def test_the_fuzz_tells_a_clear_error_from_others(read, kind):
    form = _form(read)
    assert engine.outcome(form, form.files()).kind == kind


def test_a_result_that_the_oracle_denies_is_kept_with_its_input(tmp_path):
    def check(folder: pathlib.Path, found):
        assert found == b'{"a": 1}', "other bytes"

    form, tally = _form(lambda folder: (folder / "some.json").read_bytes(), check), engine.Tally()
    engine.explore(form, 40, None, tally, tmp_path)
    assert tally.counts[engine.ELSE] and tally.counts[engine.CORRECT] + tally.counts[engine.CLEAR] < tally.tried
    kept = tally.kept["wrong: other bytes"]
    assert "other bytes" in (kept / "outcome.txt").read_text() and (kept / "input" / "some.json").is_file()


def test_json_is_written_as_it_was_read_a_key_that_stands_twice_too():
    for text in ('{"a": 1, "a": [null, true, {"b": "\\ud83d"}], "c": 1.5}', "[]", '{"": NaN}'):
        assert mutations.written(mutations.parsed(text.encode())) == text
