"""The commands that are struck: a small run of every stage on picture files, and what is done with a finished one."""

import json
import pathlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from .moments import Moment

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STAGES = ("base", "lm", "ie")
PICTURES = 110  # of five captions each: three batches of keys in a queue


@dataclass(frozen=True)
class Command:
    """A command: its flags for a folder of its own, what has to be there before, how often, and when it is struck."""

    name: str
    flags: Callable[[pathlib.Path], list[str]]
    share: int
    moments: tuple[Moment, ...]
    begin: Callable[[pathlib.Path], None] = lambda folder: None


def finer_steps() -> None:
    """Called in each process: what is noted every few seconds is noted at once, what is cut in gigabytes in kilobytes.

    A run that takes seconds then passes through the states of one that takes days.
    """
    from eim_jax.data import feature_cache, image_checks, shard_writer
    from eim_jax.losses import queue_parts

    feature_cache._MARK_SECONDS = queue_parts._SECONDS = image_checks._SAVE_SECONDS = 0
    image_checks._CHUNK = 5
    shard_writer.prepare.__defaults__ = (8_000,)


def make_data(folder: pathlib.Path) -> dict[str, str]:
    """Draws the miniature's scenes into picture files with COCO's annotations; the config's fields that name them."""
    from eim_jax.data.miniature import captioning

    fields = {"data.kind": "coco", "data.images": str(folder / "images")}
    (folder / "images").mkdir(parents=True)
    for name, field, count in (("train", "annotations", PICTURES), ("test", "eval_annotations", 8)):
        split = captioning.load(name, scenes=count)
        images = [{"id": image, "file_name": f"{image}.png"} for image in split.images.ids]
        for row, image in enumerate(images):
            split.images[row].save(folder / "images" / image["file_name"])
        texts = [
            {"id": i, "image_id": split.images.ids[sample.image], "caption": sample.response}
            for i, sample in enumerate(split.samples)
        ]
        (folder / f"{name}.json").write_text(json.dumps({"images": images, "annotations": texts}))
        fields[f"data.{field}"] = str(folder / f"{name}.json")
    return fields


def _train_flags(data: dict[str, str]) -> list[str]:
    fields = {
        **data,
        "arms": "('eim',)",
        "arm.eim.sequence": str(STAGES),
        "decode.methods": "('greedy',)",
        "decode.max_tokens": 6,
        "decode.java": False,
        "towers.dropout": 0.1,
        "towers.scan": True,  # less to compile
        "data.max_tokens": 12,
        "checkpoint.every_steps": 2,
        "log_every": 3,  # so that a run also continues within a record's steps
    }
    for name in STAGES:
        fields |= {f"stages.{name}.steps": 8, f"stages.{name}.warmup_steps": 2, f"stages.{name}.batch": 8}
    return [f"--config={ROOT / 'configs/miniature.py'}", *(f"--config.{f}={v}" for f, v in fields.items())]


def commands(data: dict[str, str], trained: pathlib.Path) -> list[Command]:
    """All of them; `trained` is the folder of a finished training, which the later ones read or copy."""
    config = _train_flags(data)

    def copy(folder: pathlib.Path) -> None:
        shutil.copytree(trained / "run", folder / "run")

    anywhere = Moment("any moment")
    save, result = "run/eim/checkpoints/*/steps/*tmp*", "run/eim/checkpoints/*/result*tmp*"
    return [
        Command(
            "train",
            lambda folder: [*config, f"--workdir={folder / 'run'}"],
            5,
            (
                anywhere,
                Moment("checking and tokenising", words="checking"),
                Moment("writing features", files="run/cache/features/*/*partial*"),
                Moment("building a queue", files="run/queues/*/process-0/*"),
                Moment("writing a queue", files="run/queues/*"),
                Moment("saving a checkpoint", files=save),
                Moment("saving a stage's result", files=result),
                Moment("compiling", words="compiling"),
                Moment("in a stage's steps", files="run/eim/checkpoints/*/steps/[0-9]"),
                Moment("scoring", files="run/eim/predictions_test*.json"),
                Moment("the report", files="run/eim/scores_test.json"),
            ),
        ),
        Command(
            "prepare",
            lambda folder: [*config, "--mode=prepare", f"--out={folder / 'prepared'}"],
            2,
            (
                anywhere,
                Moment("writing shards", files="prepared/*/*/*array_record*"),
                Moment("writing the index", files="prepared/index/*"),
            ),
        ),
        Command(
            "export",
            lambda folder: [f"--workdir={trained / 'run'}", "--mode=export", f"--out={folder / 'exported'}"],
            1,
            (anywhere, Moment("writing files", files="exported.partial/*"), Moment("the end", files="exported")),
        ),
        Command(
            "eval",
            lambda folder: [f"--workdir={folder / 'run'}", "--mode=eval", "--config.decode.max_tokens=4"],
            2,
            (
                anywhere,
                Moment("writing scores", files="run/eim/evals/*/*"),
                Moment("the report", files="run/eim/evals/*/scores_test.json"),
            ),
            copy,
        ),
    ]
