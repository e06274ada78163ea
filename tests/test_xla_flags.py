"""scripts/xla_flags.py, by which `make test` starts with any XLA."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "xla_flags.py"


def kept(*flags):
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)


def test_flags_that_xla_does_not_know_are_left_out_and_the_others_stay_in_order():
    known = ("--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1")
    done = kept("--xla_no_such_thing=1", known[0], "--xla_nor_this=false", known[1])
    assert done.returncode == 0 and done.stdout.split() == list(known)


def test_a_value_that_xla_cannot_read_is_no_unknown_flag():
    done = kept("--xla_backend_optimization_level=high")
    assert done.returncode and "--xla_backend_optimization_level=high" in done.stderr
