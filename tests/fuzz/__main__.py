"""Runs the formats in turn for some minutes and prints what came of it."""

import argparse
import pathlib
import sys
import time

from .engine import ELSE, Tally, explore, table
from .formats import FORMATS

SLICE = 3.5  # seconds of one format's turn


def run(minutes: float, tallies: dict[str, Tally], seed: int, keep: pathlib.Path) -> None:
    """Gives each format a turn of a few seconds, round after round; another seed in each."""
    forms = [form for form in FORMATS if form.name in tallies]
    end, turn = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        for form in forms:
            explore(form, 5000, seed + turn, tallies[form.name], keep, min(SLICE, end - time.monotonic()))
        turn += 1
        tried = sum(t.tried for t in tallies.values())
        others = sum(t.counts[ELSE] for t in tallies.values())
        print(f"after turn {turn}: {tried:,} inputs, {others} of them {ELSE}", file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", default="", help="formats, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("runs/fuzz"), help="where failures are kept")
    options = parser.parse_args()
    names = tuple(filter(None, options.only.split(",")))
    if unknown := set(names) - {form.name for form in FORMATS}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(form.name for form in FORMATS)}")
    tallies = {form.name: Tally() for form in FORMATS if not names or form.name in names}
    try:
        run(options.minutes, tallies, options.seed, options.keep)
    finally:  # also after Ctrl-C
        print(table(tallies))
    sys.exit(any(tally.counts[ELSE] for tally in tallies.values()))


if __name__ == "__main__":
    main()
