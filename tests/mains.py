"""Real processes of eim_jax.main, forked from one that has imported everything and touched no device.

A process's imports take longer than most of what the tests have it do. Each one is its own process all the same: own
devices, own flags, own end; a signal reaches it alone.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import pathlib
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = ("train", "evaluate", "caption", "chat", "serve", "inspection", "exporting", "plan", "prepare")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["eim_jax.main", "eim_jax.training.kinds", *(f"eim_jax.commands.{c}" for c in COMMANDS)]
)


def _become(flags, environment, output, stdin, before):
    """What `python -m eim_jax.main FLAGS <stdin >output 2>&1` does, imports aside; after what `before` does."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, closefd=False)  # the server's own is closed
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = ["eim_jax/main.py", *flags]
    gc.freeze()  # the server's imports: collections while JAX traces need not look at them
    from eim_jax import main

    if before is not None:
        before()
    try:
        main.cli()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Main:
    """A process of `python -m eim_jax.main FLAGS` on CPU devices, its input from a file, its output in one.

    `before`, a function of a module, is called in the process first: it may change what no flag does.
    """

    def __init__(self, flags, output, stdin=os.devnull, before=None, **environment):
        os.environ["JAX_PLATFORMS"] = "cpu"  # JAX reads it at its import, which is in the server
        self.output = pathlib.Path(output)
        arguments = ([str(flag) for flag in flags], environment, str(output), str(stdin), before)
        self._process = _context.Process(target=_become, args=arguments)
        self._process.start()

    def said(self) -> str:
        """Its output up to now."""
        return self.output.read_text() if self.output.exists() else ""

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout=400) -> int:
        """Its exit code once it has ended; killed, and an error, if that takes longer than `timeout` seconds."""
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"not ended after {timeout} s:\n{self.said()[-3000:]}")
        return self.poll()

    def signal(self, number):
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # ended since then, and reaped by the server
                os.kill(self._process.pid, number)

    def kill(self):
        """SIGKILL, and waits for the end."""
        self.signal(signal.SIGKILL)
        self._process.join()

    def until(self, condition):
        """Polls until the condition holds; an end before that is a failure that shows the output."""
        while not condition():
            assert self.poll() is None, f"the process ended before the moment to stop it:\n{self.said()[-3000:]}"
            time.sleep(0.002)


def run(flags, output, timeout=400, **environment) -> tuple[int, str]:
    """Runs it to its end: (exit code, output)."""
    process = Main(flags, output, **environment)
    code = process.wait(timeout)
    return code, process.said()
