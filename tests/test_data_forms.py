"""Claims about the forms that people's data have; oracles: one conversation written in each, VQA's own file names."""

import json
import pathlib
import re

import pytest
from test_instruct import photo, write

from eim_jax.data.bad_items import BadDataError
from eim_jax.data.conversation import messages_of
from eim_jax.data.datasets import instruct_tables
from eim_jax.data.datasets.instruct import load_instruct

SAID = [
    ("system", "Be kind."),
    ("user", "What is it?"),
    ("assistant", "A cat."),
    ("user", "Why?"),
    ("assistant", "Genes."),
]
GPT = {"system": "system", "user": "human", "assistant": "gpt"}


def messages(*said):
    return [{"role": role, "content": text} for role, text in said]


def conversations(*said, names=GPT):
    return [{"from": names[role], "value": text} for role, text in said]


MARKED = [SAID[0], ("user", "<image>\nWhat is it?"), *SAID[2:]]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]
NAMED = [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}, *PARTS[0]["content"][1:]]}, PARTS[1]]
URL = {"type": "image_url", "image_url": {"url": "file://1.jpg"}}
FORMS = {
    "openai": {"image": "1.jpg", "messages": messages(*SAID)},
    "openai, marked": {"image": "1.jpg", "messages": messages(*MARKED)},
    "trl, parts": {"images": ["1.jpg"], "messages": [*messages(SAID[0]), *PARTS, *messages(*SAID[3:])]},
    "parts that name": {"messages": [*messages(SAID[0]), *NAMED, *messages(*SAID[3:])]},
    "parts as the API has them": {
        "messages": [
            *messages(("developer", "Be kind.")),
            {"role": "user", "content": [URL, *PARTS[0]["content"][1:]]},
            *messages(*SAID[2:]),
        ]
    },
    "sharegpt": {"image": "1.jpg", "conversations": conversations(*SAID)},
    "sharegpt's other names": {"image": "1.jpg", "conversations": conversations(*SAID, names={r: r for r in GPT})},
    "llava": {"image": "1.jpg", "system": "Be kind.", "conversations": conversations(*MARKED[1:])},
    "alpaca with a history": {
        "image": "1.jpg",
        "system": "Be kind.",
        "history": [["What is it?", "A cat."]],
        "instruction": "Why?",
        "output": "Genes.",
    },
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    photo(folder / "1.jpg")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_one_conversation_is_the_same_sample_in_every_form(tmp_path, pictures, form):
    path = write(tmp_path / "x.json", [FORMS[form]], lines=True)
    split, report = load_instruct(path, pictures, template="tokenizer", multi_turn=True)
    last = split.samples[-1]
    assert [(turn["role"], turn["content"]) for turn in messages_of(last.instruction)] == SAID[:-1]
    assert (last.image, last.response, report.notes) == (0, "Genes.", ())


def asks(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, *messages(("assistant", "A cat."))]}


TEXT = {"type": "text", "text": "What?"}
BAD = {
    "no list": ({"messages": "x"}, '"messages" must be a list of {"role", "content"}'),
    "a tool": ({"messages": messages(("user", "a"), ("tool", "b"))}, "\"messages\"[1] is from 'tool': turns must"),
    "no answer": ({"messages": messages(("user", "a"))}, '"messages"[0] has no answer from "assistant"'),
    "the system alone": ({"messages": messages(("system", "a"))}, '"messages"[0] has no answer from "assistant"'),
    "two systems": ({"system": "b", "messages": messages(*SAID[:3])}, '"messages"[0] is a system turn beside'),
    "a call": (
        {"messages": [*messages(("user", "a")), {"role": "assistant", "content": "b", "tool_calls": [1]}]},
        '"messages"[1] has "tool_calls"',
    ),
    "null": ({"messages": messages(("user", "a"), ("assistant", None))}, '"messages"[1] "content" is not a text'),
    "a part": (asks(TEXT, {"type": "input_audio"}), '"content"[1] is neither a text nor a picture'),
    "from the web": (asks({"type": "image", "url": "https://a.b/c.png"}, TEXT), "pictures are read from files"),
    "inside": (asks({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, TEXT), "read from files"),
    "no picture": (asks({"type": "image"}, TEXT), 'has the marker <image>, but the row has no "image"'),
    "two pictures": ({"image": "2.jpg", **asks({"type": "image", "image": "1.jpg"}, TEXT)}, "names 2 pictures"),
    "sharegpt begins with gpt": ({"conversations": conversations(*SAID[2:])}, "\"conversations\"[0] is from 'gpt'"),
    "no words": ({"question": " ", "answer": "b"}, '"question" is empty'),
    "a number": ({"question": "a", "answer": 3}, '"answer" is not a text but int'),
    "no answers": ({"question": "a", "answers": []}, '"answers" must be a list of texts'),
    "an empty answer": ({"question": "a", "answers": ["b", ""]}, '"answers"[1] is empty'),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_conversation_is_named_by_file_row_and_turn(tmp_path, pictures, kind):
    row, message = BAD[kind]
    with pytest.raises(BadDataError) as caught:
        load_instruct(write(tmp_path / "x.jsonl", [{"question": "a", "answer": "b"}, row], lines=True), pictures)
    [item] = caught.value.bad
    assert item.file == "x.jsonl line 2" and message in item.problem


def test_questions_take_the_answer_that_most_gave_and_keep_all_as_references(tmp_path, pictures):
    rows = [
        {"image": "1.jpg", "question": "What?", "answer": "a cat"},
        {"question": "How many?", "answers": ["2", "3", "3"]},
        {"question": "Who?", "answers": [{"answer": "he"}, {"answer": "she"}]},
    ]
    split, report = load_instruct(write(tmp_path / "q.jsonl", rows, lines=True), pictures)
    assert [(s.image, s.response) for s in split.samples] == [(0, "a cat"), (None, "3"), (None, "he")]
    assert split.samples[0].instruction == "Instruction: What?\nResponse:" and report.notes == ()
    assert dict(split.references) == {"q/0/0": ("a cat",), "q/1/0": ("2", "3", "3"), "q/2/0": ("he", "she")}


def vqa(folder, indent=None, **changes):
    """VQAv2's two files as its authors name them, of two questions about one picture."""
    asked = [{"image_id": 9, "question": f"Q{n}?", "question_id": 9000 + n} for n in range(2)]
    given = [
        {"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(["no", *["yes"] * 9])
    ]
    said = [{"question_id": q["question_id"], "multiple_choice_answer": "yes", "answers": given} for q in asked]
    questions = {"info": {}, "data_type": "mscoco", "data_subtype": "train2014", "questions": asked}
    for key, value in changes.items():
        (said if key == "annotations" else questions)[value[0]] = value[1]
    (folder / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps(questions, indent=indent))
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": said}, indent=indent))
    return folder / "v2_OpenEnded_mscoco_train2014_questions.json"


@pytest.mark.parametrize("name", ["COCO_train2014_000000000009.jpg", "000000000009.jpg"])
def test_vqav2s_pair_of_files_becomes_questions_with_ten_answers(tmp_path, name):
    photo(tmp_path / "im" / name)
    split, _ = load_instruct(vqa(tmp_path, indent=None if name[0] == "C" else 1), tmp_path / "im")
    stem = "v2_OpenEnded_mscoco_train2014_questions"
    assert [(s.id, s.image, s.response) for s in split.samples] == [
        (f"{stem}/9000/0", 0, "yes"),
        (f"{stem}/9001/0", 0, "yes"),
    ]
    assert split.images.names == [name]
    assert split.references[f"{stem}/9000/0"] == ("no", *["yes"] * 9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": (0, {"question_id": 5})}, "question_id 9000 has no annotation in v2_mscoco_train2014_ann"),
        ({"subtype": ("data_subtype", None)}, '"data_subtype" is missing'),
        ({"questions": ("questions", [{"question": "a"}])}, r'"questions"\[0\] has no question_id'),
        ({"questions": ("questions", [])}, "annotations.json: question_id 9000 is no question of"),
    ],
)
def test_vqav2s_files_that_do_not_fit_are_named_with_the_question(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        load_instruct(vqa(tmp_path, **changes), tmp_path)


def test_vqav2s_annotations_are_looked_for_beside_the_questions(tmp_path):
    path = vqa(tmp_path)
    with pytest.raises(ValueError, match="name the file of the questions"):
        load_instruct(tmp_path / "v2_mscoco_train2014_annotations.json", tmp_path)
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no annotations .*v2_mscoco_train2014_annotations.json"):
        load_instruct(path, tmp_path)


def picture_bytes(path):
    return {"bytes": path.read_bytes(), "path": path.name}


def table_rows(pictures):
    """A row of each of several forms, as `datasets` keeps them: pictures as structs of bytes and a name."""
    inside = picture_bytes(pictures / "1.jpg")
    return [
        {"image": inside, "question": "What?", "answer": "a cat"},
        {"image": inside, "question": "Who?", "answer": "he"},
        {"image": None, "question": "Why?", "answer": "so"},
    ]


def parquet(path, rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_parquet_files_pictures_become_files_of_the_cache_once(tmp_path, pictures):
    path = parquet(tmp_path / "t.parquet", table_rows(pictures))
    split, report = load_instruct([(path, 1.0)], None, cache=tmp_path / "cache")
    assert [(s.id, s.image, s.response) for s in split.samples] == [
        ("t/0/0", 0, "a cat"),
        ("t/1/0", 0, "he"),
        ("t/2/0", None, "so"),
    ]
    [file] = (tmp_path / "cache" / "pictures_inside").iterdir()
    assert file.read_bytes() == (pictures / "1.jpg").read_bytes() and file.suffix == ".jpg"
    assert split.images[0].size == (16, 12) and report.notes == ()
    written = file.stat().st_mtime_ns
    again = load_instruct([path], None, cache=tmp_path / "cache").split
    assert again.fingerprint() == split.fingerprint() and file.stat().st_mtime_ns == written
    elsewhere = load_instruct([path], None, cache=tmp_path / "other").split  # the cache's place is no part of a run
    assert elsewhere.fingerprint() == split.fingerprint()


def test_trls_columns_of_messages_and_pictures_are_read_from_a_table(tmp_path, pictures):
    row = {"images": [picture_bytes(pictures / "1.jpg")], "messages": [*messages(SAID[0]), *messages(*MARKED[1:3])]}
    parts = {"images": [picture_bytes(pictures / "1.jpg")], "messages": PARTS}
    for name, one in (("a", row), ("b", parts)):
        split, _ = load_instruct(parquet(tmp_path / f"{name}.parquet", [one]), None, cache=tmp_path / "cache")
        assert [(s.image, s.response) for s in split.samples] == [(0, "A cat.")]
        assert "Instruction: What is it?\nResponse:" in split.samples[0].instruction


def test_a_table_that_cannot_be_used_is_named_with_what_to_do(tmp_path, pictures):
    with pytest.raises(ValueError, match=r"t\.parquet has pictures inside: give `cache`"):
        load_instruct(parquet(tmp_path / "t.parquet", table_rows(pictures)), None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"t\.parquet is no Parquet file that can be read"):
        load_instruct(tmp_path / "t.parquet", None)
    with pytest.raises(FileNotFoundError, match="no instruction file"):
        load_instruct(tmp_path / "u.parquet", None)
    bad = {**table_rows(pictures)[0], "answer": ""}
    with pytest.raises(BadDataError, match=r"row v/0 \(v\.parquet row 0\): \"answer\" is empty"):
        load_instruct(parquet(tmp_path / "v.parquet", [bad]), None, cache=tmp_path)
    torn = {**table_rows(pictures)[0], "image": {"bytes": b"\xff\xd8\xffno", "path": "a.jpg"}}
    with pytest.raises(BadDataError, match=r"image inside://.*\(w\.parquet row 0, w/0\)"):
        load_instruct(parquet(tmp_path / "w.parquet", [torn]), None, cache=tmp_path)
    with pytest.raises(ValueError, match=r"source 'hf://a': write hf://owner/name"):
        load_instruct("hf://a", None)


def test_a_table_of_the_datasets_library_gives_the_same_rows(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    rows = table_rows(pictures)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    assert list(instruct_tables.records_of(table)) == rows
    several = datasets.Dataset.from_dict({"images": [[rows[0]["image"]]]})
    several = several.cast_column("images", datasets.List(datasets.Image()))
    assert list(instruct_tables.records_of(several)) == [{"images": [rows[0]["image"]]}]


def test_the_hubs_names_are_taken_apart():
    source = instruct_tables.HubSource.read("hf://a-b/c.d/e@main:train_sft")
    assert (source.repository, source.config, source.revision, source.split) == ("a-b/c.d", "e", "main", "train_sft")
    assert (source.stem, str(instruct_tables.HubSource.read("hf://a/b").split)) == ("c.d-e-train_sft", "train")


def test_the_guides_samples_are_read(tmp_path, pictures):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "guides" / "data.md").read_text()
    samples = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.S)]
    *rows, questions = samples
    assert len(rows) == 5 and all("questions" not in row for row in rows)
    split, report = load_instruct(write(tmp_path / "x.json", rows), pictures)
    assert report.notes == () and {sample.response for sample in split.samples} == {"A cat.", "cat"}
    (tmp_path / "v2_OpenEnded_questions.json").write_text(json.dumps(questions))
    said = {"annotations": [{"question_id": 9000, "answers": [{"answer": "cat"}], "multiple_choice_answer": "cat"}]}
    (tmp_path / "v2_annotations.json").write_text(json.dumps(said))
    photo(tmp_path / "COCO_train2014_000000000009.jpg")
    [sample] = load_instruct(tmp_path / "v2_OpenEnded_questions.json", tmp_path).split.samples
    assert (sample.image, sample.response) == (0, "cat")
