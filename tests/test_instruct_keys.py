"""Claims about the keys of instruction rows: what is read, what is refused by name, what is one counted note."""

import json

import pytest
from test_instruct import alpaca, llava, photo, write

from eim_jax.data.bad_items import BadDataError
from eim_jax.data.datasets.instruct import load_instruct


@pytest.fixture
def folder(tmp_path):
    photo(tmp_path / "photos" / "1.jpg")
    return tmp_path / "photos"


def test_the_cases_rows_are_read_or_named_by_number_and_key(shared_case):
    case = shared_case("instruct_keys")
    with pytest.raises(BadDataError) as caught:
        load_instruct(case / "rows.json", case / "im")
    said = {item.id.rpartition("/")[2]: item.problem for item in caught.value.bad}
    assert set(said) == {"4", "5"}
    assert "<image> 2 times" in said["4"] and '"video" is not read' in said["5"]
    split, _ = load_instruct(case / "rows.json", case / "im", on_bad="drop")
    *pictured, last = [(s.image, s.instruction) for s in split.samples]
    assert pictured == [(0, "Instruction: What colour?\nResponse:")] * 3
    assert last == (None, "You are a pirate\nInstruction: Hi\nResponse:Arr\nInstruction: And now?\nResponse:")
    assert split.images.names == ["a.jpg"]


@pytest.mark.parametrize(
    "row",
    [
        alpaca(0, image="1.jpg"),
        alpaca(0, images=["1.jpg"], image="1.jpg"),
        alpaca(0, images="1.jpg", input="<image>"),
        {"instruction": "Do 0.", "images": ["1.jpg"], "instances": [{"input": "", "output": "Done 0."}]},
        {**llava("a", None, "<image>Do 0.", "Done 0."), "images": ["1.jpg"]},
    ],
)
def test_a_picture_is_read_in_every_form_by_either_key(tmp_path, folder, row):
    [sample] = load_instruct(write(tmp_path / "x.json", [row]), folder).split.samples
    assert (sample.image, sample.instruction, sample.response) == (0, "Instruction: Do 0.\nResponse:", "Done 0.")


BAD = {
    "two pictures": (alpaca(0, images=["1.jpg", "2.jpg"]), '"images" names 2 pictures'),
    "two keys of two pictures": (alpaca(0, image="1.jpg", images=["2.jpg"]), '"images" names 2 pictures'),
    "an odd picture": (alpaca(0, images=[3]), '"images" must be a list'),
    "a marker without": (alpaca(0, input="<image>"), '"input" has the marker <image>, but the row has no "image"'),
    "markers in two texts": (
        alpaca(0, instruction="<image> a", input="<image>", image="1.jpg"),
        '"instruction" and "input" have the marker',
    ),
    "a marker alone": (alpaca(0, instruction="<image>", image="1.jpg"), "nothing but the marker"),
    "an answer": (alpaca(0, output="<image>", image="1.jpg"), '"output" has the marker <image>: an answer is text'),
    "a turn's answer": (llava("a", "1.jpg", "Q", "<image> A"), r'"conversations"[1] has the marker <image>: an answer'),
    "twice": (llava("a", "1.jpg", "<image><image> Q", "A"), '"conversations"[0] has the marker <image> 2 times'),
    "a video's marker": (llava("a", None, "<video> Q", "A"), "has the marker <video>, which is not read"),
    "a system prompt of another type": (alpaca(0, system=["Be kind."]), '"system" is not a text but list'),
    "a system prompt's marker": (alpaca(0, system="See <image>", image="1.jpg"), '"system" has the marker <image>'),
    "half a character": (alpaca(0, system="ab\ud83d"), '"system" holds half a character'),
    "a history of another form": (alpaca(0, history=["a"]), '"history" must be a list of [question, answer]'),
    "a history of a number": (alpaca(0, history=[["a", 3]]), '"history"[0][1] is not a text but int'),
    "a history without an answer": (alpaca(0, history=[["a", ""]]), '"history"[0][1] is empty'),
    "a history's marker": (alpaca(0, history=[["<image> a", "b"]]), '"history"[0][0] has the marker <image>, but'),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_sample_cannot_hold_is_a_bad_item_by_key(tmp_path, folder, kind):
    row, message = BAD[kind]
    with pytest.raises(BadDataError) as caught:
        load_instruct(write(tmp_path / "x.json", [alpaca(9), row]), folder)
    [item] = caught.value.bad
    assert item.file == "x.json row 1" and message in item.problem


def test_keys_that_hold_nothing_are_no_fault(tmp_path, folder):
    row = alpaca(0, image=None, images=[], system="", history=[])
    split, report = load_instruct(write(tmp_path / "x.json", [row]), folder)
    assert len(split) == 1 and report.notes == ()


def asked(tmp_path, row, **options):
    split, report = load_instruct(write(tmp_path / "x.json", [row]), tmp_path / "photos", **options)
    assert report.notes == ()
    return [(sample.instruction, sample.response) for sample in split.samples]


def test_a_system_prompt_stands_in_front_and_a_history_before_the_question(tmp_path, folder):
    row = alpaca(
        0, input="Now.", system=" Be kind. ", history=[["Hello?", "Hi."], ["<image>\nA dog?", "Yes."]], image="1.jpg"
    )
    before = "Instruction: Hello?\nResponse:Hi.\nInstruction: A dog?\nResponse:Yes.\n"
    assert asked(tmp_path, row) == [(f"Be kind.\n{before}Instruction: Do 0. Now.\nResponse:", "Done 0.")]
    spaced = before.replace("Response:", "Response: ")
    assert asked(tmp_path, row, seam="spaced")[0][0] == f"Be kind.\n{spaced}Instruction: Do 0. Now.\nResponse:"
    form = "### Instruction:\n{}\n\n### Response:{}"
    turns = "\n\n".join(form.format(*pair) for pair in (("Hello?", "Hi."), ("A dog?", "Yes.")))
    [(said, _)] = asked(tmp_path, row, template="alpaca")  # the row's own system prompt in place of Alpaca's preface
    assert said == f"Be kind.\n\n{turns}\n\n### Instruction:\nDo 0.\n\n### Input:\nNow.\n\n### Response:"


def test_a_history_precedes_all_turns_of_a_conversation_which_count_only_with_multi_turn(tmp_path, folder):
    row = {**llava("a", None, "Q", "A", "R", "B"), "history": [["P", "O"]]}
    said = "Instruction: P\nResponse:O\n"
    alone = [(f"{said}Instruction: Q\nResponse:", "A"), (f"{said}Instruction: R\nResponse:", "B")]
    assert asked(tmp_path, row) == alone
    after = f"{said}Instruction: Q\nResponse:A\nInstruction: R\nResponse:"
    assert asked(tmp_path, row, multi_turn=True) == [alone[0], (after, "B")]


def test_a_template_of_ones_own_is_followed_or_refused(tmp_path, folder):
    for template in ("USER: {instruction} {input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"):
        said = {extra: asked(tmp_path, alpaca(0, input=extra), template=template)[0][0] for extra in ("", "{input}")}
        between = " " if "{input}" in template else "\n"
        assert said == {
            "": "USER: Do 0.\nASSISTANT:",
            "{input}": f"USER: Do 0.{between}{{input}}\nASSISTANT:",  # braces in a question are its own
        }
    for template, match in (("vicuna", "neither one of plain, lavin, alpaca"), ("{instruction} ", "ends with white")):
        with pytest.raises(ValueError, match=match):
            asked(tmp_path, alpaca(0), template=template)


def test_any_other_key_is_one_counted_note(tmp_path, capsys):
    rows = [alpaca(0, text="a"), alpaca(1, text="b", score=3), {**llava("c", None, "Q", "A"), "model": "m"}]
    _, report = load_instruct(write(tmp_path / "x.json", rows), None)
    note = "x.json: keys that are not read: 'text' (2 rows), 'score' (1 rows), 'model' (1 rows)"
    assert report.notes == (note,) and capsys.readouterr().out.count(note) == 1
    assert json.loads((tmp_path / "x.json").read_text()) == rows
