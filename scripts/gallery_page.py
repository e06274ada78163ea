"""Writes docs/results/gallery.md and its pictures from a finished run of the miniature.

python scripts/gallery_page.py runs/miniature          [--out=docs: the folder of the documentation]

Nobody chooses what is shown: the test pictures fall into four groups by which arms name exactly the objects that are
there, and of each group the page holds the first ones in the order of the test set.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from eim_jax.config import read_saved
from eim_jax.data.datasets import load_split
from eim_jax.data.miniature.captioning import MiniatureSplit, has_held_out
from eim_jax.data.miniature.drawing import Scene
from eim_jax.data.miniature.language import parse

ARMS = ("baseline", "eim")
GROUPS = {  # which of ARMS are right: heading
    (True, True): "Both name what is there",
    (False, True): "EIM alone",
    (True, False): "The baseline alone",
    (False, False): "Neither",
}
EACH = 5  # pictures a group
SCALE = 3  # 32 pixels are too few to look at
HEAD = """# Captions, beside their pictures

What the two arms of [the demo](captions.md) say of test pictures that neither has seen. A caption counts as right when
it names exactly the objects that are there, each with its colour and shape (✓); else what is wrong or left out stands
below it. Sizes, numbers and places are not looked at. Half of the test pictures hold a colour and shape that never met
in training (*new pair*).

Nothing here was chosen: of each group these are the first {each} in the order of the test set.

| {count} test pictures | |
|---|---|
{table}

One run (seed {seed}), {date}, {cores} CPU cores, jax {jax}: `{command}`, then
`python scripts/gallery_page.py runs/miniature`. How far scores move from one run to the next, and what in EIM's recipe
they come from: [over several seeds](captions.md), [part by part](index.md).
"""


def verdict(text: str, scene: Scene) -> str:
    """A tick, or the objects that a caption names wrongly and those that it leaves out."""
    said = parse(text).pairs
    parts = [
        f"{what}: {', '.join(' '.join(pair) for pair in sorted(pairs))}"
        for what, pairs in (("wrong", said - scene.pairs), ("left out", scene.pairs - said))
        if pairs
    ]
    return "; ".join(parts) or "✓"


def captions(workdir: Path, arm: str) -> dict[str, str]:
    """An arm's captions of the test pictures, by the first decoding method."""
    found = json.loads((workdir / arm / "predictions_test.json").read_text(encoding="utf-8"))
    return {str(entry["image_id"]): entry["caption"].strip() for entry in found}


def grouped(said: dict[str, dict[str, str]], scenes: dict[str, Scene]) -> dict[tuple[bool, ...], list[str]]:
    """The test pictures' ids, in order, by which arms are right."""
    found: dict[tuple[bool, ...], list[str]] = {key: [] for key in GROUPS}
    for key, scene in scenes.items():
        found[tuple(parse(said[arm][key]).pairs == scene.pairs for arm in ARMS)].append(key)
    return found


def rows(ids: list[str], said: dict[str, dict[str, str]], split: MiniatureSplit) -> list[str]:
    """One group as a table, a line a picture."""
    lines = ["| picture | baseline | EIM | a true caption |", "|---|---|---|---|"]
    for key in ids:
        scene = split.scenes[key]
        cells = [f"{said[arm][key]}<br>*{verdict(said[arm][key], scene)}*" for arm in ARMS]
        new = "<br>*new pair*" if has_held_out(scene) else ""
        picture = f"![{key}](../assets/gallery/{key}.png){new}"
        lines.append(f"| {' | '.join([picture, *cells, split.references[key][0]])} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Writes the page and the pictures that it shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    config = read_saved(options.workdir)
    split = load_split(config, "test", options.workdir) if config else None
    if not isinstance(split, MiniatureSplit):
        raise SystemExit(f"error: {options.workdir} is no run of the miniature: its test pictures are what is shown")
    for arm in ARMS:
        if not (file := options.workdir / arm / "predictions_test.json").exists():
            raise SystemExit(f"error: no {file}: the page compares {' with '.join(ARMS)}, both scored")
    said = {arm: captions(options.workdir, arm) for arm in ARMS}
    if short := [arm for arm in ARMS if set(said[arm]) != set(split.scenes)]:
        raise SystemExit(
            f"error: {options.workdir}/{short[0]} has captions of {len(said[short[0]])} of {len(split.scenes)} test "
            "pictures: the page shows all, train with config.data.eval_limit=0"
        )
    groups = grouped(said, split.scenes)
    run = json.loads((options.workdir / "run.json").read_text(encoding="utf-8"))
    page = HEAD.format(
        each=EACH,
        count=len(split.scenes),
        table="\n".join(f"| {GROUPS[key].lower().replace('eim', 'EIM')} | {len(ids)} |" for key, ids in groups.items()),
        seed=config.seed,
        date=run["started"][:10],
        cores=run["machine"]["cpu_cores"],
        jax=run["versions"]["jax"],
        command=" ".join(word for word in run["command"].split() if not word.startswith("--workdir")),
    )
    folder = options.out / "assets/gallery"
    folder.mkdir(parents=True, exist_ok=True)
    where = {str(key): row for row, key in enumerate(split.images.ids)}
    for old in folder.glob("*.png"):
        old.unlink()
    for key, ids in groups.items():
        shown = ids[:EACH]
        page += "\n".join(["", f"## {GROUPS[key]}", "", *rows(shown, said, split), ""]) if shown else ""
        for name in shown:
            picture = split.images[where[name]]
            larger = picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.NEAREST)
            larger.save(folder / f"{name}.png", optimize=True)
    (options.out / "results/gallery.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
