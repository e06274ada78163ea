"""What is read is what was written: every file of a checkpoint and a queue, cut, extended, flipped or replaced."""

import json
import pickle

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eim_jax.config import read_saved
from eim_jax.evaluation.tasks.captions import CAPTIONS
from eim_jax.losses.queues import Queue, StaleQueue, manifest
from eim_jax.reporting.arm_files import read_arm
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.training.log import read_metrics
from eim_jax.utils.files import SUMS, Damaged, check_sums, read_json, read_rows

TRAINED = {"lm/ln_f/scale": np.arange(4096.0, dtype=np.float32), "st/dense/kernel": np.ones((64, 64), np.float32)}


def flip(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


CHANGES = {
    "flipped": flip,
    "cut": lambda content: content[:-1],
    "extended": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "pickled": lambda content: pickle.dumps(np.array([{}])),
    "other JSON": lambda content: b"[7]",
}


def batches():
    return iter(grain.MapDataset.range(20).to_iter_dataset())


def saved(folder):
    trained = jax.tree.map(jnp.asarray, TRAINED)
    with StageCheckpoints(folder) as store:
        store.save(3, trained, optax.adam(1e-3).init(trained), batches(), {"seconds": 1.0})


def restored(folder):
    like = jax.tree.map(jnp.zeros_like, TRAINED)
    with StageCheckpoints(folder) as store:
        return store.restore(like, optax.adam(1e-3).init(like), batches())


def finished(folder):
    with StageCheckpoints(folder) as store:
        store.finish(jax.tree.map(jnp.asarray, TRAINED), {"steps": 3})


def result(folder):
    with StageCheckpoints(folder) as store:
        assert store.finished
        return store.result(jax.tree.map(jnp.zeros_like, TRAINED))


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)


@pytest.mark.parametrize(("write", "read", "place"), [(saved, restored, "steps"), (finished, result, "result")])
def test_any_change_of_any_file_of_a_checkpoint_is_named_with_what_to_delete(tmp_path, write, read, place):
    write(tmp_path)
    whole = read(tmp_path)
    assert np.array_equal(whole[1 if place == "steps" else 0]["lm/ln_f/scale"], TRAINED["lm/ln_f/scale"])
    files = files_of(tmp_path)
    assert len(files) > 4
    for number, file in enumerate(files):
        if file.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            continue  # when the save began and that it ended: nothing that a run reads
        content = file.read_bytes()
        name = list(CHANGES)[number % len(CHANGES)]
        for change in {"flipped", name}:
            if change == "flipped" and file.name == SUMS:
                continue  # a flip in a sum's own digits is told by the file that it belongs to; in a space it is none
            file.write_bytes(CHANGES[change](content))
            with pytest.raises(Damaged, match=f"delete {tmp_path / place}, the same command makes it again"):
                read(tmp_path)
        file.unlink()
        if file.name != SUMS:
            with pytest.raises(Damaged, match="delete"):
                read(tmp_path)
        file.write_bytes(content)
    read(tmp_path)


def test_a_note_of_when_a_save_began_that_is_a_list_is_named_with_what_to_delete(tmp_path):
    """Nothing in it is a run's, but the storage layer reads it before anything else."""
    saved(tmp_path)
    (note,) = (file for file in tmp_path.rglob("_CHECKPOINT_METADATA") if file.parent.name == "3")
    note.write_text("[7]")
    with pytest.raises(Damaged, match=f"delete {tmp_path / 'steps'}, the same command makes it again"):
        restored(tmp_path)


@pytest.mark.parametrize(("write", "read"), [(saved, restored), (finished, result)])
def test_a_checkpoint_of_an_earlier_version_without_sums_restores(tmp_path, write, read):
    write(tmp_path)
    sums = list(tmp_path.rglob(SUMS))
    assert len(sums) == 1
    sums[0].unlink()
    read(tmp_path)


def queue_facts():
    return manifest("k", weights="w", data="d", tokenizer="t", pooling="p", similarity="dot", dtype="int8", count=40)


def test_any_change_of_any_file_of_a_queue_is_named_with_what_to_delete(tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    folder = tmp_path / "q"
    Queue.of(rows, dtype="int8", similarity="dot").save(folder, queue_facts())
    files = files_of(folder)
    assert [file.name for file in files] == ["groups.npy", "keys.npy", "manifest.json", "scale.npy"]
    for file in files:
        content = file.read_bytes()
        for name, change in CHANGES.items():
            if file.name == "manifest.json" and name in ("flipped", "extended"):
                continue  # a flip there is another setting, or a sum that fits no file
            file.write_bytes(change(content[:-1] if file.name == "manifest.json" else content))  # without its newline
            with pytest.raises(StaleQueue, match=rf"damaged .*delete {folder}, the same command makes it again"):
                Queue.load(folder, queue_facts())
        file.write_bytes(content)
    Queue.load(folder, queue_facts())


def test_a_queue_of_an_earlier_version_without_sums_loads(tmp_path):
    Queue.of(np.eye(40, 8, dtype=np.float32) + 1, dtype="int8", similarity="dot").save(tmp_path / "q", queue_facts())
    file = tmp_path / "q" / "manifest.json"
    facts = json.loads(file.read_text())
    assert sorted(facts.pop("sha256")) == ["groups.npy", "keys.npy", "scale.npy"]
    file.write_text(json.dumps(facts))
    Queue.load(tmp_path / "q", queue_facts())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"{}", b'{"n": "3"}', b'{"n": true}', b"[" * 9999]
)
def test_state_files_have_one_reader_that_names_the_file(tmp_path, content):
    file = tmp_path / "state.json"
    file.write_bytes(content)
    with pytest.raises(Damaged, match=f"{file} is damaged .*delete {tmp_path}, the same command"):
        read_json(file, {"n": int}, delete=tmp_path)


def test_rows_longer_than_their_header_says_are_damaged(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((3, 2)))
    assert read_rows(tmp_path / "a.npy").shape == (3, 2)
    with open(tmp_path / "a.npy", "ab") as file:
        file.write(b"1")
    with pytest.raises(Damaged, match="by its header"):
        read_rows(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"config": 7}', b"\xff"])
def test_a_damaged_run_json_is_one_message(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(Damaged, match=rf"{tmp_path / 'run.json'} is damaged"):
        read_saved(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b'{"greedy": 7}', b"null", b""])
def test_damaged_scores_are_one_message(tmp_path, content):
    (tmp_path / "scores_test.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"scores_test\.json is damaged"):
        read_arm(CAPTIONS, tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "\ud83d", "x" * 300])
def test_a_sum_of_a_file_that_cannot_be_is_damage(tmp_path, name):
    with pytest.raises(Damaged, match=f"delete {tmp_path}, the same command makes it again"):
        check_sums(tmp_path, {name: "0" * 64})


def test_a_header_that_is_no_literal_is_damage(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((3, 2)))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(b"}", b"("))
    with pytest.raises(Damaged, match=r"a\.npy is damaged"):
        read_rows(tmp_path / "a.npy")


@pytest.mark.parametrize("line", [b'{"step": "1"}', b'{"step": null}', b'{"stage_index": 0.5}', b'{"step": true}'])
def test_a_step_of_the_log_that_is_no_number_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: (step|stage_index) is .*, not a whole number: delete this"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("line", [b"\xff\xfe", b"7", b"{", b"[" * 9999])
def test_a_damaged_line_of_the_log_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON record: delete this line"):
        read_metrics(tmp_path / "metrics.jsonl")
