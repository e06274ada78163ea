"""The modes of `main`: train (then score, then write the report), eval, caption, chat, inspect, export."""

import functools
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from eim_jax.commands import chat as talking
from eim_jax.commands import exporting, inspection
from eim_jax.config import Config, ConfigError
from eim_jax.data.datasets import load_split
from eim_jax.data.datasets.mme import YesNoSplit
from eim_jax.data.datasets.scienceqa import QASplit
from eim_jax.data.samples import FileImages, Split
from eim_jax.data.validation import file_problem
from eim_jax.evaluation import scoring
from eim_jax.evaluation.metrics import mme
from eim_jax.evaluation.tasks.answers import scored
from eim_jax.generation.inference import encode_images, generate_text
from eim_jax.models.vlm import VLM
from eim_jax.parallel import processes
from eim_jax.reporting.page import write_report
from eim_jax.reporting.questions import Item
from eim_jax.training import partition
from eim_jax.training import setup as loading
from eim_jax.training.arms import plan_arm, run_arm
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console, print_table
from eim_jax.utils.files import write_json

SCORES = {  # in the terminal's table
    "Bleu_4": "BLEU-4",
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE_L",
    "CIDEr": "CIDEr",
    "SPICE": "SPICE",
    **{f"accuracy/{name}": name for name in ("Avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")},
    "unparsed": "unparsed",
    **{f"mme/{name}": name for name in (*mme.TASKS, "sum", "perception", "cognition", "total")},
    "nll": "nll",
    "shape_colour_f1": "object F1",
}
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def train(config: Config, workdir: Path, record: dict) -> None:
    """Trains every arm in turn, scores it on the test split, and writes workdir/report.html."""
    begun = time.monotonic()
    inputs = loading.load(config, workdir)
    check_identity(inputs)
    with processes.first_alone("test data"):
        test = load_split(config, "test", workdir)
    for arm in config.arms:
        plan_arm(inputs, arm)  # what cannot run is said before anything has
    saved = read_record(workdir)
    spent = saved.get("seconds", 0.0)
    kept = {key: saved[key] for key in ("started", "finished", "seconds") if key in saved}
    record = {**record, "identity": inputs.identity(), **kept}
    write_json(workdir / "run.json", record)
    news, table = False, {}
    for arm in config.arms:
        console.rule(f"{arm}: {config.arm[arm].description or ' -> '.join(config.arm[arm].sequence)}")
        try:
            vlm, params = run_arm(inputs, arm)
        except BaseException:
            write_json(workdir / "run.json", record | {"seconds": spent + time.monotonic() - begun})
            raise
        if test is None:
            continue
        scores = scoring.read_scores(inputs, workdir / arm, test)
        if processes.agreed(scores is None):
            news = True
            scores = scoring.evaluate(inputs, vlm, params, test, workdir / arm)
        table[arm] = scores
    if news or test is None:
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        record |= {"finished": finished, "seconds": round(spent + time.monotonic() - begun, 1)}
        write_json(workdir / "run.json", record)
    if test is None:
        console.print("no test questions (config.data.mme is empty): trained, not scored", soft_wrap=True)
    else:
        _report(workdir, test, config.data.eval_limit, table)


def evaluate(config: Config, workdir: Path) -> None:
    """Scores the trained arms again, with the decoding settings given now, and renews the report."""
    with processes.first_alone("test data"):
        test = load_split(config, "test", workdir)
    if test is None:
        raise ConfigError("config.data.mme is empty: give the MME folder to be answered")
    inputs = loading.load(config, workdir, data=False)
    check_identity(inputs)
    table = {}
    for arm in config.arms:
        vlm, params = trained(inputs, arm)
        table[arm] = scoring.evaluate(inputs, vlm, params, test, workdir / arm)
    _report(workdir, test, config.data.eval_limit, table)


def caption(config: Config, workdir: Path, arm: str, images: list[Path], out: Path) -> None:
    """Captions image files, or all images in folders, with a trained arm; prints them and writes JSON."""
    if config.data.kind not in ("coco", "miniature"):
        raise ConfigError("this run was trained to follow instructions: ask it with --mode=chat --image=FILE")
    files = _pictures(images)
    problems = {file: file_problem(file) for file in files}
    bad = [f"{file}: {problem}" for file, problem in problems.items() if problem]
    if bad:
        raise ConfigError("--images: these cannot be captioned:\n  " + "\n  ".join(bad))
    inputs = loading.load(config, workdir, data=False)
    check_identity(inputs)
    vlm, params = trained(inputs, arm)
    ids = [str(file) for file in files]
    split = Split("your", (), FileImages(Path(), ids, ids))
    rows, method = list(range(len(files))), config.decode.methods[0]
    seen = encode_images(inputs, vlm, params, split, rows)
    captions = generate_text(inputs, vlm, params, seen, rows, [""] * len(rows), method, f"captions by {method}")
    for name, words in zip(ids, captions, strict=True):
        console.print(f"{name}: {words}", soft_wrap=True)
    write_json(out, [{"image_id": name, "caption": words} for name, words in zip(ids, captions, strict=True)])
    console.print(f"written to {out}", soft_wrap=True)


def chat(config: Config, workdir: Path, arm: str, image: Path | None) -> None:
    """A conversation with a trained arm."""
    talking.check(image)
    inputs = loading.load(config, workdir, data=False)
    check_identity(inputs)
    vlm, params = trained(inputs, arm)
    talking.chat(inputs, vlm, params, image)


def inspect(config: Config, workdir: Path, arm: str, samples: int) -> None:
    """Shows training samples as the losses see them, with the arm as trained, or as training would start."""
    inputs = loading.load(config, workdir)
    check_identity(inputs)
    try:
        vlm, params = trained(inputs, arm)
        console.print(f"arm {arm} after training", soft_wrap=True)
    except ConfigError:
        vlm, params = loading.start(inputs, config.arm[arm])
        console.print(f"arm {arm} as it starts to train (not all its stages are finished)", soft_wrap=True)
    inspection.inspect(inputs, arm, vlm, params, samples)


def export(config: Config, workdir: Path, arm: str, out: Path) -> None:
    """Writes a trained arm as plain files."""
    inputs = loading.load(config, workdir, data=False)
    check_identity(inputs)
    _, params = trained(inputs, arm)
    exporting.export(inputs, arm, params, out)
    console.print(f"written to {out}", soft_wrap=True)


def trained(inputs: Inputs, arm: str) -> tuple[VLM, Flat]:
    """An arm's model with the parameters its last stage left; raises ConfigError when a stage is not finished."""
    *_, (_, vlm, params) = after_stages(inputs, arm)
    return vlm, params


def after_stages(inputs: Inputs, arm: str) -> Iterator[tuple[str, VLM, Flat]]:
    """(stage, model, parameters) as training starts ("start") and as each stage left them; raises as `trained`."""
    vlm, params = loading.start(inputs, inputs.config.arm[arm])
    yield "start", vlm, params
    for i, name in enumerate(inputs.config.arm[arm].sequence):
        with StageCheckpoints(inputs.workdir / arm / "checkpoints" / f"{i}-{name}") as store:
            if not store.finished:
                raise ConfigError(
                    f"stage {name} of arm {arm} is not finished in {inputs.workdir}: run --mode=train first"
                )
            leaves, _ = partition.split(params, partition.groups(inputs.config.stages[name], params))
            params = {**params, **store.result(leaves)[0]}
        yield name, vlm, params


def check_identity(inputs: Inputs) -> None:
    """Refuses a workdir whose results were trained from other weights, tokenisers or data, naming which."""
    saved, found = read_record(inputs.workdir).get("identity", {}), inputs.identity()
    changed = [name for name in found if name in saved and saved[name] != found[name]]
    if changed:
        what = " and another ".join(name.replace("_", " ") for name in changed)
        raise ConfigError(
            f"{inputs.workdir} was trained with another {what}: put the old files back, or choose another --workdir"
        )


def read_record(workdir: Path) -> dict:
    """The workdir's run.json, {} for a fresh one."""
    path = workdir / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _report(workdir: Path, test: Split, limit: int, table: dict[str, dict]) -> None:
    if not processes.is_first():
        return
    rows, present = [], [k for k in SCORES if any(s.get(k) is not None for m in table.values() for s in m.values())]
    for arm, methods in table.items():
        for method, scores in methods.items():
            values = [scores.get(k) for k in present]
            shown = [
                "-" if v is None else f"{v:.1f}" if k.startswith("mme/") else f"{v:.3f}"
                for k, v in zip(present, values, strict=True)
            ]
            rows.append([arm, method, *shown])
    notes = [s.get("notes", {}).get("decoding", "") for m in table.values() for s in m.values()]
    what = " ".join(notes[0].rpartition("; ")[2].split()[:2])
    print_table(f"scores on the test split ({what})", ["arm", "decoding", *(SCORES[k] for k in present)], rows)
    where = {id_: row for row, id_ in enumerate(test.images.ids)}
    items = questions_of(test, limit)
    path = write_report(workdir, lambda id_: test.images[where[str(id_)]], test.references, items)
    console.print(f"report: {path}", soft_wrap=True)


def questions_of(test: Split, limit: int) -> list[Item] | None:
    """The test's questions as the report shows them; None for captions."""

    def picture(sample):
        return None if sample.image is None else functools.partial(test.images.__getitem__, sample.image)

    if isinstance(test, QASplit):
        return [
            Item(s.id, picture(s), p.question, p.hint, p.choices, p.answer)
            for s in scored(test, limit)
            for p in [test.problems[s.id]]
        ]
    if isinstance(test, YesNoSplit):
        return [
            Item(s.id, picture(s), q.question, "", ("Yes", "No"), ("Yes", "No").index(q.answer))
            for s in scored(test, limit)
            for q in [test.questions[s.id]]
        ]
    return None


def _pictures(places: list[Path]) -> list[Path]:
    files = []
    for place in places:
        if place.is_dir():
            inside = sorted(f for f in place.iterdir() if f.suffix.lower() in PICTURES)
            if not inside:
                raise ConfigError(f"--images: the folder {place} holds no picture ({', '.join(sorted(PICTURES))})")
            files += inside
        elif place.exists():
            files.append(place)
        else:
            raise ConfigError(f"--images: no file or folder {place}")
    return files
