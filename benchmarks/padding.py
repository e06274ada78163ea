"""Share of padding among the text tokens of training batches: fully padded, cut to a few widths, and grouped by length.

python benchmarks/padding.py --kind coco|scienceqa|instruct|miniature --source FILE_OR_FOLDER --tokenizer PLACE
    [--max_tokens 40] [--batch 40]
One table: rows are config.data.length_window, columns config.data.buckets. Counted over one epoch that the widths were
not chosen on; no model runs.
"""

import argparse

import numpy as np

from eim_jax.data import tokenize
from eim_jax.data.batch_order import Order
from eim_jax.data.datasets import coco, instruct, scienceqa
from eim_jax.data.miniature import captioning

BUCKETS, WINDOWS = (1, 2, 4, 8), (1, 8, 32, 100)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("coco", "scienceqa", "instruct", "miniature"), default="miniature")
    parser.add_argument("--source", help="coco: captions file; scienceqa: folder; instruct: file")
    parser.add_argument("--tokenizer", default="miniature/gpt2")
    parser.add_argument("--max_tokens", type=int, default=40, help="config.data.max_tokens")
    parser.add_argument("--batch", type=int, default=40)
    options = parser.parse_args()

    if options.kind == "miniature":
        split = captioning.load("train", seed=0)
    elif options.source is None:
        parser.error(f"--kind={options.kind} needs --source")
    elif options.kind == "coco":
        split = coco.load_coco(options.source, None, "train", on_bad="drop").split
    elif options.kind == "scienceqa":
        split = scienceqa.load_scienceqa(options.source, "train").split
    else:
        split = instruct.load_instruct(options.source, None, on_bad="drop").split
    tokenizer = tokenize.load_tokenizer(options.tokenizer)
    lengths = tokenize.encode_split(split, tokenizer, options.max_tokens, eos=True).valid.sum(1)
    steps = len(lengths) // options.batch
    print(f"{len(lengths):,} texts of {lengths.mean():.1f} tokens on average, {lengths.max()} at most")
    print(f"| batches put together by length | {' | '.join(f'{count} widths' for count in BUCKETS)} |")
    print("|---|" + "---|" * len(BUCKETS))
    for window in WINDOWS:
        shares = []
        for count in BUCKETS:
            order = Order(len(lengths), options.batch, 0, lengths, window).with_widths(count)
            rows = [order.rows(step) for step in range(steps, 2 * steps)]  # the second epoch
            real = sum(int(lengths[part].sum()) for part in rows)
            shares.append(1 - real / (options.batch * sum(order.width(part) for part in rows)))
        print(f"| {window if window > 1 else 'none'} | {' | '.join(f'{np.round(100 * s, 1)} %' for s in shares)} |")


if __name__ == "__main__":
    main()
