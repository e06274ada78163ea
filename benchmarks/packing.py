"""A language model's stage with samples that share rows of slots, against the same batches in rows of their own.

python benchmarks/packing.py --kind coco|scienceqa --source FILE_OR_FOLDER --tokenizer PLACE [--stage lm|base|adapter]
    [--layers 4] [--width 512] [--batch 40] [--max_tokens 40] [--rounds 5]
coco trains a GPT-2 (ClipCap-EIM's stages lm and ie, or ClipCap's base), scienceqa a LLaMA with LaVIN's adapters (lm,
adapter), of these layers and width, in float32 and without dropout, on batches of an epoch as config.data.buckets=4 and
config.data.pack=on make them. The sides take turns on the same batches; a step's time is given in CPU seconds of all
threads, which other work on the machine changes little, and in wall seconds. --rounds 0 counts slots alone.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from clipcap_case import SIZES as CLIPCAP_SIZES
from clipcap_case import clipcap_case
from lavin_case import SIZES as LAVIN_SIZES
from lavin_case import lavin_case
from step_case import Case, arrays

from eim_jax.config import Losses
from eim_jax.data import tokenize
from eim_jax.data.batch_order import Order
from eim_jax.data.datasets import coco, scienceqa
from eim_jax.data.packing import Packer, choose
from eim_jax.losses import objective
from eim_jax.models.language.gpt2 import GPT2Config
from eim_jax.models.language.llama import LlamaConfig
from eim_jax.training.packing import before

BUCKETS, SEED = 4, 0


def main() -> None:
    """Prints what packing saves, in slots and in time."""
    options = parsed()
    if options.kind == "coco":
        split = coco.load_coco(options.source, None, "train", on_bad="drop").split
    else:
        split = scienceqa.load_scienceqa(options.source, "train").split
    tokenizer = tokenize.load_tokenizer(options.tokenizer)
    encoded = tokenize.encode_split(split, tokenizer, options.max_tokens, eos=True)
    texts = encoded.valid.sum(1)
    order = Order(len(texts), options.batch, SEED, texts).with_widths(BUCKETS)
    case = case_of(options, len(tokenizer), int(texts.max()))
    pictured = np.array([sample.image is not None or options.kind == "coco" for sample in split.samples])
    packer = packer_of(case, order, pictured)
    if not options.rounds:
        return
    rows = [order.rows(step) for step in range(len(texts) // options.batch)]
    chosen = [rows[i] for i in np.random.default_rng(SEED).permutation(len(rows))[: options.rounds]]
    given = arrays(case)
    alone = [batch_of(given, encoded, pictured, part, order.width(part)) for part in chosen]
    together = [batch_of(given, encoded, pictured, part, int(texts.max()), packer) for part in chosen]
    timed(case, given, alone, together)


def parsed() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("coco", "scienceqa"), required=True)
    parser.add_argument("--source", required=True, help="coco: captions file; scienceqa: folder")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--stage", default="lm", help="coco: lm, ie, base; scienceqa: lm, adapter")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--max_tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5, help="batches timed; 0: only what packing leaves is counted")
    return parser.parse_args()


def case_of(options: argparse.Namespace, vocab: int, longest: int) -> Case:
    """The stage's step, its vision tower a small one."""
    shape = {"vocab": vocab, "width": options.width, "layers": options.layers, "heads": options.width // 64}
    if options.kind == "coco":
        size = CLIPCAP_SIZES["tiny"]._replace(lm=GPT2Config(**shape), length=longest)
        return clipcap_case(size, options.stage, batch=options.batch, dtype="float32", dropout=0.0)
    lm = LlamaConfig(**shape, mlp=options.width * 8 // 3 // 64 * 64)
    size = LAVIN_SIZES["tiny"]._replace(lm=lm, length=longest + 100)
    form = {"quant": "none", "accumulate": 1, "remat": "none", "dtype": "float32"}
    return lavin_case(size, options.stage, batch=options.batch, **form)


def packer_of(case: Case, order: Order, pictured: np.ndarray) -> Packer:
    """What packs the batches, with a line on the slots."""
    trained, _, frozen, *_ = case.arguments
    readings = objective.readings(case.stage, Losses())
    lengths = {name: order.lengths + before(case.vlm, {**trained, **frozen}, pictured, name) for name in readings}
    rows = [order.rows(step) for step in range(order.samples // order.batch_size)]
    packer, saving = choose(
        lengths,
        order.lengths,
        rows,
        [order.width(part) for part in rows],
        width=case.vlm.lm.config.width,
        head_width=case.vlm.lm.config.head_width,
        parts=1,
        accumulate=1,
        shapes=BUCKETS,
    )
    print(
        f"{order.samples:,} texts of {order.lengths.mean():.1f} tokens, {order.lengths.max()} at most: "
        f"padding {saving.before:.1%} -> {saving.after:.1%}, {saving.factor:.2f} times less work expected; rows "
        + ", ".join(f"{name} {shape.rows} x {shape.length}" for name, found in packer.shapes.items() for shape in found)
    )
    return packer


def batch_of(given: tuple, encoded, pictured, rows, width: int, packer: Packer | None = None):
    """A batch of these samples, with the random images of `given`, the step's arguments."""
    batch, queues = given[3:5]
    held = min((queue.keys.shape[0] for queue in queues.values()), default=1)
    made = {"index": (rows % held).astype(np.int32), "has_image": pictured[rows]}
    made |= {name: getattr(encoded, name)[rows, :width] for name in ("tokens", "valid", "supervised")}
    batch = batch._replace(**{name: x for name, x in made.items() if getattr(batch, name) is not None})
    return jax.tree.map(jnp.asarray, batch._replace(packing=packer(rows) if packer else None))


def timed(case: Case, given: tuple, alone: list, together: list) -> None:
    """Runs both sides in turn on the same batches and prints medians and ratios."""
    *state, frozen, _, queues, key = given
    compiled, found = {}, {"own rows": [], "shared rows": []}
    for turn in range(2):  # the first compiles and warms up
        for pair in zip(alone, together, strict=True):
            for side, batch in zip(found, pair, strict=True):
                shape = str(jax.tree.map(jnp.shape, batch))
                arguments = (*state, frozen, batch, queues, key, jnp.int32(1))
                if shape not in compiled:
                    compiled[shape] = case.step.lower(*arguments).compile()
                elif not turn:
                    continue
                wall, cpu = time.perf_counter(), time.process_time()
                *state, metrics = jax.block_until_ready(compiled[shape](*arguments))
                if turn:
                    found[side].append((time.process_time() - cpu, time.perf_counter() - wall, metrics["loss"]))
    for side, steps in found.items():
        cpu, wall = (statistics.median(step[i] for step in steps) for i in range(2))
        print(f"{side}: {cpu:.2f} CPU s, {wall:.2f} s a step (median of {len(steps)})")
    ratios = [one[0] / other[0] for one, other in zip(*found.values(), strict=True)]
    print(f"own rows / shared rows, CPU time: {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})")


if __name__ == "__main__":
    main()
