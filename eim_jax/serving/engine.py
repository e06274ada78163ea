"""The model's own thread: requests of all arms, in batches."""

import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from eim_jax.serving.arm_worker import ArmWorker
from eim_jax.serving.errors import RequestError
from eim_jax.serving.job import Call, Failed, Job, Result
from eim_jax.serving.served_arm import ServedArm

WINDOW = 0.003  # seconds that an idle model waits for requests that come together


class Engine:
    """Runs the jobs that it is given on one thread; whatever goes wrong with one is told to that one.

    Args:
      arms: by name.
      max_waiting: jobs that may wait for a place; more are refused.
    """

    def __init__(self, arms: Mapping[str, ServedArm], max_waiting: int) -> None:
        self.arms = dict(arms)
        self._workers = {name: ArmWorker(arm) for name, arm in arms.items()}
        self._coming: queue.SimpleQueue[Job | Call | ArmWorker | list[Job] | None] = queue.SimpleQueue()
        self._max_waiting, self._ended = max_waiting, False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Lets what was given come to its end, and ends the thread."""
        self._coming.put(None)
        self._thread.join()

    def add(self, arm: ServedArm) -> None:
        """Takes another arm, which answers from now on: one that was trained meanwhile."""
        self._coming.put(ArmWorker(arm))
        self.call(arm.name, lambda served: None)

    @property
    def waiting(self) -> int:
        """Jobs that have no place yet."""
        return self._coming.qsize() + sum(worker.waiting for worker in list(self._workers.values()))

    def submit(self, job: Job | Call) -> None:
        """Gives it a job; its `emit` hears of the rest.

        Raises:
          RequestError: too many wait already.
        """
        if self.waiting >= self._max_waiting:
            message = f"{self._max_waiting} requests wait already: try again in a moment"
            raise RequestError(message, status=429, code="rate_limit_exceeded")
        self._coming.put(job)

    def together(self, jobs: list[Job]) -> None:
        """Gives it jobs that begin in one group, whatever the limit: the server's own."""
        self._coming.put(jobs)

    def call(self, arm: str, function: Any) -> Any:
        """Calls function(served arm) on the thread and returns what it returns; blocks."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._coming.put(Call(arm, function, answers.put))
        found = answers.get()
        if isinstance(found, Failed):
            raise found.error
        return found.value

    def _run(self) -> None:
        while not (self._ended and self._coming.empty() and not self._busy):
            self._take()
            for worker in self._workers.values():
                if worker.busy:
                    worker.turn()

    @property
    def _busy(self) -> bool:
        return any(worker.busy for worker in self._workers.values())

    def _take(self) -> None:
        """Takes what has come; an idle model waits for the first, and a moment for those that come with it."""
        until = None
        while True:
            try:
                if self._busy and until is None:
                    job = self._coming.get_nowait()
                elif until is None and not self._ended:
                    job = self._coming.get()
                    until = time.monotonic() + WINDOW
                else:
                    left = 0.0 if until is None else until - time.monotonic()
                    job = self._coming.get(timeout=max(left, 0.0))
            except queue.Empty:
                return
            if job is None:
                self._ended = True
                return
            if isinstance(job, ArmWorker):
                self._workers[job.arm.name] = job
                self.arms[job.arm.name] = job.arm
            elif isinstance(job, Job | list):
                for each in job if isinstance(job, list) else [job]:
                    self._workers[each.arm].add(each)
            elif not job.cancelled:
                self._do(job)

    def _do(self, call: Call) -> None:
        try:
            call.emit(Result(call.function(self.arms[call.arm])))
        except Exception as error:
            call.emit(Failed(error))
