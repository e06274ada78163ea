"""A trace of a few steps of each stage, for XProf, TensorBoard or ui.perfetto.dev."""

from pathlib import Path
from typing import Any

import jax

from eim_jax.utils.console import console


class Profile:
    """Traces the steps `start` <= number < `stop` of a stage, counted from 0, into `folder`; a context manager.

    `steps` is "start:stop", or "" for no trace. A stage that resumes later than `start` is traced from there on. Each
    process writes its own.
    """

    def __init__(self, steps: str, folder: Path):
        self._start, self._stop = map(int, steps.split(":")) if steps else (0, 0)
        self._folder = folder / f"process-{jax.process_index()}" if jax.process_count() > 1 else folder
        self._running = False

    def __enter__(self) -> "Profile":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the trace of a stage that stops early."""
        self._end()

    def before(self, number: int) -> None:
        """Begins the trace where this is its first step."""
        if self._start <= number < self._stop and not self._running:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True

    def after(self, number: int, metrics: Any) -> None:
        """Ends the trace after its last step, whose results it waits for."""
        if self._running and number + 1 >= self._stop:
            jax.block_until_ready(metrics)
            self._end()

    def _end(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            console.print(f"trace in {self._folder} (open perfetto_trace.json.gz at ui.perfetto.dev)", soft_wrap=True)
