"""Freed memory that stays with the process: by the kernel's own count of the pages it had to hand out."""

import subprocess
import sys
from importlib import metadata

from eim_jax.allocator import keep_freed_memory

FAULTS = """
import resource
import jax, jax.numpy as jnp
from eim_jax.allocator import keep_freed_memory
assert keep_freed_memory()
program = jax.jit(lambda x: jnp.sin(x @ x.T).sum())  # a temporary of 64 MiB: 16,384 pages
x = jnp.ones((4096, 64))
for _ in range(3):
    jax.block_until_ready(program(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    jax.block_until_ready(program(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_program_that_runs_again_needs_no_new_pages():
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"})
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 16_384  # in ten runs; as glibc comes, each run needs so many


def test_beside_an_accelerators_plugin_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: ["xla_cuda13"])
    assert not keep_freed_memory()
