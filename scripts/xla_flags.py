"""Prints the flags of XLA that it is given, without those that the installed XLA does not know.

python scripts/xla_flags.py --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false

XLA ends a process for a flag that it does not know, and what one version knows the next may not.
"""

import os
import re
import subprocess
import sys

TRY = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()"


def known(flags: list[str]) -> list[str]:
    """Returns the flags that XLA starts with.

    Raises:
      RuntimeError: it does not start, and names none of them.
    """
    flags = list(flags)
    while True:
        env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
        done = subprocess.run([sys.executable, "-c", TRY], env=env, capture_output=True, text=True)
        if not done.returncode:
            return flags
        named = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", done.stderr)
        left = [flag for flag in flags if flag not in (named[1].split() if named else ())]
        if left == flags:
            raise RuntimeError(f"XLA does not start with {flags}: {done.stderr[-2000:]}")
        flags = left


if __name__ == "__main__":
    found = known(sys.argv[1:])
    if left_out := [flag for flag in sys.argv[1:] if flag not in found]:
        print(f"this XLA does not know {' '.join(left_out)}: left out", file=sys.stderr)
    print(*found)
