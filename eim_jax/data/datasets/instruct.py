"""Instruction data in the forms people have it: Alpaca's, LLaVA's and self-instruct's, mixed into one split."""

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eim_jax.config import ConfigError, Data
from eim_jax.data.bad_items import BadDataError, BadItem, check_on_bad, listed, printable, text_problem
from eim_jax.data.data_set import DataSet, Published, Shards, exists, plain_split
from eim_jax.data.datasets import instruct_lavin, instruct_scored, instruct_tables, mme
from eim_jax.data.datasets.instruct_folders import Folders
from eim_jax.data.datasets.instruct_prompt import prompt, template_of
from eim_jax.data.datasets.instruct_rows import BadRowError, Row, read_rows, take_apart, unread_keys
from eim_jax.data.datasets.instruct_sources import mixture, row_ids, shares, sources_of, taken_rows
from eim_jax.data.held_out import HeldOut
from eim_jax.data.rows import earlier_turns
from eim_jax.data.samples import ImageSource, Sample, Split
from eim_jax.utils.console import console
from eim_jax.utils.files import user_path


@dataclasses.dataclass(frozen=True)
class InstructReport:
    """What loading found: bad items, what was left out for them (rows of the files), and samples of each source."""

    bad: tuple[BadItem, ...]
    dropped_images: int
    dropped_rows: int
    samples: Mapping[str, int]
    notes: tuple[str, ...] = ()  # keys of rows that are not read, a line a file

    def __str__(self) -> str:
        """Returns a line on the mix, and several more when something was left out."""
        lines = [", ".join(f"{name}: {count:,} samples" for name, count in self.samples.items()), *self.notes]
        if self.bad:
            lines.append(f"left out {self.dropped_rows:,} rows and {self.dropped_images:,} images; bad items:")
            lines += listed(self.bad)
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class InstructSplit(Split):
    """A split that also knows whether prompts hold earlier answers, which `data.seam` joins to their questions.

    `choices` are those of each sample whose row lets choose, for the task "choices".
    """

    turns: bool = dataclasses.field(default=False, kw_only=True)
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, kw_only=True)


class Instructions(NamedTuple):
    """A split and what was wrong with its sources."""

    split: Split
    report: InstructReport


class _Placed(NamedTuple):
    """A good row, and where it comes from: the start of its samples' ids, its place in words, its source's name."""

    id: str
    where: str
    source: str
    row: Row


class _Words(NamedTuple):
    """How a row becomes prompts; see `load_instruct`."""

    template: str
    multi_turn: bool
    seam: str

    def prompt(self, row: Row, turn: int) -> str:
        if row.prompted:
            return row.pairs[turn][0].instruction
        before = row.pairs[:turn] if self.multi_turn and row.dialogue else ()
        earlier = earlier_turns((*row.history, *before), self.seam)
        return prompt(row.pairs[turn][0], earlier, template=self.template, system=row.system)


def load_instruct(
    sources: Sequence[Any] | str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    *,
    name: str = "train",
    multi_turn: bool = False,
    template: str = "plain",
    seam: str = "one_string",
    outside_images: bool = False,
    on_bad: str = "error",
    threads: int = 4,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    scienceqa_images: str | os.PathLike[str] | None = None,
    held_out: HeldOut | None = None,
) -> Instructions:
    r"""Returns the rows of all sources, one after the other, as one split (its order is the files'), and a report.

    A source is a file, or (file, share) with 0 < share <= 1: that share of its rows, drawn by `seed`; a smaller share
    is a part of a larger one. Rows never repeat: a copy would be its own negative in the queues. A file is a JSON list,
    JSON Lines or Parquet, or "hf://owner/name:split" of the Hugging Face hub, and each row tells its form by its keys:
      Alpaca         {"instruction", "input" (may be missing, null or ""), "output"}
      LLaVA          {"id", "image" (missing or null: text only), "conversations": [{"from": human|gpt, "value"}, ...]}
      self-instruct  {"id", "instruction", "instances": [{"input", "output"}, ...]}
      ShareGPT       the same, the speakers also system, user and assistant
      OpenAI, TRL    {"messages": [{"role": system|user|assistant, "content": a text, or a list of parts}, ...]}
      VQA            {"image", "question", "answer" or "answers" (of several people), "choices" (may be missing)};
                     or VQAv2's file of questions, its annotations beside it
      LaVIN          {"instruction", "answer", "image", "image_source", "qid", "options"}, in {"all": [...]}; the
                     instruction is the whole prompt; pictures of source "sqa" are `scienceqa_images`' {qid}/image.png
    Each may have an "image", or "images" of one; a "system" prompt, which stands in front; a "history"
    [[question, answer], ...], the turns before; other keys are counted in the report's notes. `images` is the folder
    of the images (None if no row has one); for "000000000009.jpg" it may hold
    COCO_train2014_000000000009.jpg. Samples of one image share its row. Every image used is decoded
    once (see image_checks.py; `cache` remembers the verdict).

    Every (human, gpt) pair and every instance is one sample, its question in the words of `template`
    (instruct_prompt.TEMPLATES, or a text of one's own; "plain": "Instruction: {instruction} {input}\nResponse:") and
    the answer as it stands; "<image>" markers go. LaVIN asks each question of a conversation alone; `multi_turn` puts
    the turns before it in front, each answer joined to its question as `seam` says (data/rows.py). Sample ids are
    "{file stem}/{row's id}/{turn}"; a row without an id has its place in the file, counted from 0, a later row with the
    same id "{id}#{place}", a second file of the same stem "{stem}#2". The split's references are all answers of each
    sample that count as right. With `held_out` the split is what its side of a share leaves: see `HeldOut`.

    Bad items are rows in no known form, with a missing, empty or undecodable text, conversations that do not alternate
    human, gpt, markers without an image, twice in a question or in an answer, more than one image, videos, missing or
    unreadable images. on_bad="error" raises BadDataError listing
    them; "drop" leaves out the whole row (the published Alpaca-52k has rows with an empty output: it needs "drop").

    Raises:
      BadDataError: bad items, with on_bad="error"; all are listed.
      ValueError: a file is not UTF-8 or JSON, a share is outside (0, 1], rows have images and no folder is given,
        no rows are left, or the template is none.
    """
    check_on_bad(on_bad)
    template_of(template)
    folder = None if images is None else user_path(images)
    scienceqa = None if scienceqa_images is None else user_path(scienceqa_images)
    for place in (folder, scienceqa):
        if place is not None and not place.is_dir():
            raise FileNotFoundError(f"no image folder {place}")

    files = sources_of(sources)
    placed, bad, notes = _read_all(files, seed, cache)
    unread = len(bad)

    inside = None if cache is None else user_path(cache) / instruct_tables.FOLDER
    folders = Folders(folder, {instruct_lavin.SCIENCEQA: scienceqa, instruct_tables.INSIDE: inside})
    users: dict[str, _Placed] = {}  # of each picture, the first
    for item in placed:
        if item.row.image is not None:
            users.setdefault(item.row.image, item)
    file_of = {image: folders.file_of(image, item.where) for image, item in users.items()}
    options = {"threads": threads, "cache": cache, "outside_images": outside_images}
    first = {file_of[image]: f"{item.where}, {item.id}" for image, item in reversed(users.items())}
    broken = folders.broken(list(dict.fromkeys(file_of.values())), first, bad, **options)
    where = ", ".join(str(path) for path, _, _ in files)
    if bad and on_bad == "error":
        raise BadDataError(where, bad)
    kept = [item for item in placed if item.row.image is None or file_of[item.row.image] not in broken]
    if not kept:
        raise ValueError(f"{where}: no rows are left; {len(bad)} bad items")
    usable = len(kept)
    if held_out is not None:
        kept = held_out.kept(kept, [item.row.image or item.id for item in kept], where)
    split = _build(name, kept, file_of, folders, _Words(template, multi_turn, seam))
    counts = {stem: sum(len(item.row.pairs) for item in kept if item.source == stem) for _, _, stem in files}
    report = InstructReport(tuple(bad), len(broken), unread + len(placed) - usable, counts, notes)
    if bad or notes:
        console.print(f"{name}: {report}", soft_wrap=True, markup=False)
    return Instructions(split, report)


def _read_all(files, seed: int, cache: Any) -> tuple[list[_Placed], list[BadItem], tuple[str, ...]]:
    """Reads the drawn rows of each file: those in a known form, the bad ones, and a note on keys that are not read."""
    placed: list[_Placed] = []
    bad: list[BadItem] = []
    notes: list[str] = []
    for number, (path, share, stem) in enumerate(files):
        unread: Counter[str] = Counter()
        records = read_rows(path, cache)
        ids = row_ids(stem, [record for _, record in records])
        for place in taken_rows(len(records), share, seed, number):
            where, record = records[place]
            unread.update(unread_keys(record))
            try:
                if problem := text_problem(ids[place]):
                    raise BadRowError(f"its id {problem}")
                placed.append(_Placed(ids[place], where, stem, take_apart(record)))
            except BadRowError as problem:
                bad.append(BadItem("row", ids[place], where, str(problem)))
        if unread:
            keys = ", ".join(f"{printable(repr(key))} ({count:,} rows)" for key, count in unread.items())
            notes.append(f"{path.name}: keys that are not read: {keys}")
    return placed, bad, tuple(notes)


def _build(
    name: str,
    placed: Sequence[_Placed],
    file_of: Mapping[str, str],
    folders: Folders,
    words: _Words,
) -> Split:
    names = list(dict.fromkeys(file_of[item.row.image] for item in placed if item.row.image is not None))
    row_of = {file: row for row, file in enumerate(names)}
    samples, references, choices = [], {}, {}
    for item in placed:
        image = None if item.row.image is None else row_of[file_of[item.row.image]]
        for turn, (_, answer) in enumerate(item.row.pairs):
            samples.append(Sample(f"{item.id}/{turn}", image, words.prompt(item.row, turn), answer))
            references[samples[-1].id] = item.row.answers or (answer,)
            if item.row.choices:
                choices[samples[-1].id] = item.row.choices
    turns = any(item.row.history or (words.multi_turn and item.row.dialogue) for item in placed)
    return InstructSplit(name, tuple(samples), folders.source(names), references, turns=turns, choices=choices)


@dataclasses.dataclass(frozen=True)
class InstructFields:
    """The fields of `config.data` that instruction data alone reads."""

    # instruct: files, or "hf://owner/name:split" of the hub, each alone or as (file, share of its rows)
    sources: tuple = ()
    mix: tuple = ()  # instruct: a weight for each source, by which an epoch shows them; () shows every sample once
    images: str = ""  # folder of the images
    multi_turn: bool = False  # instruct: a turn's instruction holds the turns before it
    # instruct: the words around a question, plain ("Instruction: ...\nResponse:") | lavin (to the letter) | alpaca
    # (LLaMA-Adapter's) | a text of your own with {instruction} and {input} | tokenizer (the LM's own chat template, in
    # every kind of data)
    template: str = "plain"
    outside_images: bool = False  # whether a file's name may lead out of the folder of the images
    # instruct: folder of ScienceQA's training pictures (QID/image.png), which LaVIN's all_data.json names beside COCO's
    scienceqa_images: str = ""
    mme: str = ""  # instruct: the MME folder that is the test; "" = none
    eval_sources: tuple = ()  # instruct: files like `sources`, to be scored on in place of training
    eval_images: str = ""  # "" = the folder above
    # This share of the sources (of their pictures, of rows without one) is not trained on; which, says eval_seed. It is
    # scored on where there are no eval_sources.
    eval_share: float = 0.0
    eval_seed: int = 0
    # instruct: what the answers are worth: answers (equal to an accepted one) | vqa (ten people's, by the challenge's
    # rule) | choices | descriptions (caption scores)
    eval_task: str = "answers"


def _load(data: Data, own: InstructFields, name: str, cache: pathlib.Path) -> tuple[Split | None, Sequence[BadItem]]:
    common = {"on_bad": data.on_bad, "threads": data.threads, "cache": cache}
    own_test = bool(own.eval_sources or own.eval_share)
    if name != "train" and not (own_test and (name == "val" or not own.mme)):  # MME lies in its own folder
        if not own.mme:
            return None, ()
        questions = mme.load_mme(own.mme, template=own.template, **common)
        return questions.split, questions.report.bad
    instruct_scored.check(own)
    if not own.sources and not (name != "train" and own.eval_sources):
        raise ConfigError("config.data.sources is empty: give files of Alpaca's or LLaVA's form, as a tuple")
    if own.mix and len(own.mix) != len(own.sources):
        raise ConfigError(
            f"config.data.mix has {len(own.mix)} weights, but config.data.sources has {len(own.sources)} sources"
        )
    common |= {"multi_turn": own.multi_turn, "template": own.template, "seam": data.seam, "name": name}
    common |= {"outside_images": own.outside_images, "scienceqa_images": own.scienceqa_images or None}
    if name != "train" and own.eval_sources:
        loaded = load_instruct(own.eval_sources, own.eval_images or own.images or None, **common)
    else:
        held_out = HeldOut(own.eval_share, own.eval_seed, name != "train") if own.eval_share else None
        loaded = load_instruct(own.sources, own.images or None, held_out=held_out, **common)
    split = dataclasses.replace(loaded.split, task=own.eval_task)
    if name != "train" or data.scored == "train":
        instruct_scored.check_task(split, own.eval_task)
    return _mixed(own, split) if name == "train" else split, loaded.report.bad


def _mixed(own: InstructFields, split: Split) -> Split:
    return dataclasses.replace(split, mixture=mixture(split.samples, own.mix)) if own.mix else split


def _prepared(own: InstructFields, name: str, index: Mapping[str, Any], images: ImageSource) -> Split:
    split = plain_split(own, name, index, images)
    # Shards hold the answer that is learned, not what else people said.
    references = {sample.id: (sample.response,) for sample in split.samples}
    return _mixed(own, dataclasses.replace(split, references=references))


def _first(own: InstructFields) -> str:
    source = (*own.sources, "")[0]
    return source[0] if isinstance(source, tuple) else source


def _source_files(own: InstructFields) -> dict[str, pathlib.Path]:
    paths = (instruct_tables.source_path(source if isinstance(source, str) else source[0]) for source in own.sources)
    files = {f"sources[{place}]": path for place, path in enumerate(paths)}
    return {what: path for what, path in files.items() if isinstance(path, pathlib.Path)}  # the hub has no file here


def _prepared_settings(own: InstructFields) -> dict[str, Any]:
    # Sources may be left out where only the prepared folder is at hand.
    sources = {"sources": shares(own.sources)} if own.sources else {}
    template = {"template": own.template} if own.template != "plain" else {}  # folders of earlier versions lack it
    held_out = {"eval_share": own.eval_share, "eval_seed": own.eval_seed} if own.eval_share else {}
    return {"multi_turn": own.multi_turn, **template, **sources, **held_out}


def _record(split: Split, samples: Sequence[Sample]) -> dict[str, Any]:
    return {"turns": [{"id": s.id, "instruction": s.instruction, "response": s.response} for s in samples]}


INSTRUCT = DataSet(
    "instruct",
    InstructFields,
    _load,
    published=Published(210000, 81000, "Alpaca's 52k and LLaVA's 158k rows; a conversation's turns would count each"),
    at_hand=lambda own: exists(_first(own)),
    unscored="give config.data.eval_sources, a share to hold out (config.data.eval_share), or the MME folder "
    "(config.data.mme)",
    free_on_resume=("mme", "eval_sources", "eval_images", "eval_task"),
    prompt=lambda own, question, earlier: prompt(question, earlier if own.multi_turn else (), template=own.template),
    shards=Shards(
        folder="instructions",
        features={"turns": [{"id": str, "instruction": str, "response": str}]},
        record=_record,
        split=_prepared,
        splits=("train",),
        from_files=("val", "test"),
        settings=_prepared_settings,
        sources=_source_files,
    ),
)
