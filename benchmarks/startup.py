"""From the command to the first step at COCO's size: seconds and memory of each part, cold and with everything cached.

python benchmarks/startup.py --photos=FOLDER --captions=FILE[,FILE] --clip_tokenizer=DIR --lm_tokenizer=DIR --out=FOLDER
    [--stage=st] [--pictures=113287] [--texts=566747] [--starts=2] [--config...]
Makes in --out what is not there: a set of that size, whose pictures are hard links to copies of the photos and whose
captions are those given, then again with a word of another caption in them, and small random towers
(scripts/make_towers.py), so that encoding itself is little. Then starts `python -m eim_jax.main` so often over one
cache, one step of one of EIM's stages in each: the first start finds nothing cached. What follows the flags is handed
on.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from pairs import machine

ROOT = Path(__file__).resolve().parent.parent
PICTURES, TEXTS = 113_287, 566_747  # Karpathy's train and restval


def main() -> None:
    """Makes what is missing, starts, and prints one table a start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures to link to")
    parser.add_argument("--captions", required=True, help="files in COCO's form, separated by commas")
    parser.add_argument("--clip_tokenizer", required=True)
    parser.add_argument("--lm_tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--stage", choices=("st", "lm", "ie"), default="st")
    options, more = parser.parse_known_args()
    out = options.out.absolute()
    make_set(out, options.photos, options.captions.split(","), options.pictures, options.texts)
    if not (out / "towers").exists():
        tokenizers = [f"--{name}_tokenizer={getattr(options, f'{name}_tokenizer')}" for name in ("clip", "lm")]
        script = [sys.executable, "scripts/make_towers.py", "--size=small", f"--out={out / 'towers'}"]
        subprocess.run([*script, *tokenizers], check=True, cwd=ROOT)
    shown = f"--pictures={options.pictures} --texts={options.texts} --stage={options.stage} {' '.join(more)}"
    print(machine("jax", "transformers", "pillow"))
    print(f"$ python benchmarks/startup.py {shown.strip()} ...")
    for number in range(options.starts):
        start(out, number, options.stage, more)


def make_set(out: Path, photos: Path, files: list[str], pictures: int, texts: int) -> None:
    """Writes out/captions.json and out/images, unless they are there."""
    if (out / "captions.json").exists():
        return
    (out / "photos").mkdir(parents=True, exist_ok=True)
    (out / "images").mkdir(exist_ok=True)
    # Copies: links do not lead from one disk to another.
    copies = [Path(shutil.copy(photo, out / "photos")) for photo in sorted(photos.iterdir())]
    names = [f"COCO_train2014_{number:012d}.jpg" for number in range(pictures)]
    for name, photo in zip(names, itertools.cycle(copies), strict=False):
        if not (out / "images" / name).exists():
            os.link(photo, out / "images" / name)
    given = [note["caption"] for file in files for note in json.loads(Path(file).read_text())["annotations"]]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    notes = [{"id": i, "image_id": i % pictures, "caption": varied(given, i)} for i in range(texts)]
    few = [note for note in notes if note["image_id"] < 10]
    (out / "scored.json").write_text(json.dumps({"images": images[:10], "annotations": few}))
    (out / "captions.json.part").write_text(json.dumps({"images": images, "annotations": notes}))
    (out / "captions.json.part").rename(out / "captions.json")


def varied(given: list[str], number: int) -> str:
    """Caption `number` of an endless row: as given the first time, then with a word of the caption `turn` places on."""
    turn, place = divmod(number, len(given))
    words = given[place].split()
    if turn and words:
        other = given[(place + turn) % len(given)].split() or words
        words[turn % len(words)] = other[turn % len(other)]
    return " ".join(words) if turn else given[place]


def start(out: Path, number: int, stage: str, more: list[str]) -> None:
    """One start to the first step, and its table."""
    command = [
        *(sys.executable, "-m", "eim_jax.main", "--config=configs/photos.py", f"--workdir={out / f'{stage}{number}'}"),
        *(f"--config.data.annotations={out / 'captions.json'}", f"--config.data.images={out / 'images'}"),
        *(f"--config.towers.clip={out / 'towers/clip'}", f"--config.towers.lm={out / 'towers/lm'}"),
        *(
            f"--config.data.cache={out / 'cache'}",
            f"--config.data.eval_annotations={out / 'scored.json'}",
            "--config.arm.eim.prompts=0",
        ),
        f"--config.arm.eim.sequence=('{stage}',)",
        *(f"--config.stages.{stage}.{field}" for field in ("steps=1", "warmup_steps=0", "warmup_epochs=0.0")),
        *("--config.decode.methods=('greedy',)", "--config.data.eval_limit=2", "--config.decode.max_tokens=4", *more),
    ]
    if number:  # the queue is the work directory's: what the first start built is read
        shutil.copytree(out / f"{stage}0/queues", out / f"{stage}{number}/queues", dirs_exist_ok=True)
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found: list[tuple[float, int, float]] = []
    watch = threading.Thread(target=sample, args=(psutil.Process(child.pid), found))
    watch.start()
    lines, first, parts = [], None, ""
    assert child.stdout is not None
    for line in child.stdout:
        lines.append(line)
        if reached := re.search(r"first step after .*?: (.*)", line):
            first, parts = time.time(), reached[1]
            child.terminate()  # what follows is no start
    child.wait()
    watch.join()
    (out / f"start{number}.log").write_text("".join(lines))
    if first is None:
        sys.exit("".join(lines[-20:]))
    table(number, parts, found)


def sample(process: psutil.Process, found: list[tuple[float, int, float]]) -> None:
    """Notes (seconds since the process began, bytes of memory of its own, seconds of its cores) ten times a second."""
    begun = process.create_time()
    try:
        while process.status() != psutil.STATUS_ZOMBIE:
            memory, cores = process.memory_info(), process.cpu_times()
            # Pages of mapped files are the system's, which takes them back when it needs them.
            found.append((time.time() - begun, memory.rss - memory.shared, cores.user + cores.system))
            time.sleep(0.1)
    except psutil.NoSuchProcess:
        return


def table(number: int, parts: str, found: list[tuple[float, int, float]]) -> None:
    """Prints a row for each part that the run's own log names: its seconds, cores' seconds, and most memory."""
    print(f"\n## {'nothing cached' if not number else 'everything cached'}\n")
    print("| part | seconds | seconds of cores | most memory, GB |\n|---|---|---|---|")
    end = 0.0
    for part in parts.split(", "):
        name, amount = re.fullmatch(r"(.*?) ([\d.:]+)(?: s)?", part).groups()
        begun, end = end, end + sum(float(x) * 60**i for i, x in enumerate(reversed(amount.split(":"))))
        _row(name, begun, end, found)
    _row("together", 0.0, end, found)


def _row(name: str, begun: float, end: float, found: list[tuple[float, int, float]]) -> None:
    rows = [row for row in found if begun <= row[0] <= end] or found[-1:]
    cores, peak = rows[-1][2] - rows[0][2], max(row[1] for row in rows) / 1e9
    print(f"| {name} | {end - begun:.1f} | {cores:.1f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
