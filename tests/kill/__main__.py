"""`python -m tests.kill --kills=50 [--minutes=60] [--seed=0]`: prints a table, exits 1 on a finding."""

import argparse
import pathlib
import random
import shutil
import sys
import tempfile
import time


def main() -> int:
    """Runs until so many strikes are done, or so many minutes are over."""
    flags = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    flags.add_argument("--kills", type=int, default=0, help="strikes to be done; 0: as many as there is time for")
    flags.add_argument("--minutes", type=float, default=0, help="after which no trial begins; 0: without end")
    flags.add_argument("--seed", type=int, default=None, help="of the moments; drawn and printed without")
    flags.add_argument("--folder", type=pathlib.Path, default=None, help="a new one; where failures stay")
    flags.add_argument("--programs", type=pathlib.Path, default=None, help="compiled programs of an earlier campaign")
    given = flags.parse_args()
    if not given.kills and not given.minutes:
        flags.error("give --kills or --minutes")
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from .campaign import Campaign, Wrong

    seed = random.randrange(10**6) if given.seed is None else given.seed
    folder = given.folder or pathlib.Path(tempfile.mkdtemp(prefix="eim_jax_kill_"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, in {folder}", flush=True)
    end = time.monotonic() + 60 * (given.minutes or 10**6)
    campaign = Campaign(folder, seed, given.programs)
    try:
        campaign.prepare()
    except Wrong as error:
        print(error)
        return 1
    tally = campaign.tally
    while time.monotonic() < end and (not given.kills or tally.struck < given.kills):
        known = len(tally.wrong)
        campaign.trial()
        for line in tally.wrong[known:]:
            print(line, flush=True)
        print(f"{tally.struck} strikes, {len(tally.wrong)} trials wrong", flush=True)
    print(tally.table())
    if tally.wrong:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
