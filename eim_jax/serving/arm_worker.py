"""One arm's answers in the making: who waits, who has a place in the open batch, what is sent."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from eim_jax.generation.open_batch import Progress, RowSettings
from eim_jax.serving.job import Answered, Failed, Job, Piece
from eim_jax.serving.served_arm import ServedArm
from eim_jax.serving.text_stream import TextStream

STEPS = 4  # tokens between two looks at who came, who left and what can be sent


@dataclass
class _Writing:
    """An answer with a place."""

    job: Job
    stream: TextStream
    prompt_tokens: int
    sent: int = 0  # tokens whose pieces were sent


class ArmWorker:
    """Decodes the jobs of one arm; called by the model's thread alone.

    Args:
      arm: the arm.
    """

    def __init__(self, arm: ServedArm) -> None:
        self.arm = arm
        self._waiting: deque[Job] = deque()
        self._beams: deque[Job] = deque()
        self._writing: dict[int, _Writing] = {}
        self._leaving: set[int] = set()
        self._batch = arm.open_batch()

    @property
    def waiting(self) -> int:
        """Jobs without a place."""
        return len(self._waiting) + len(self._beams)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._writing)

    def add(self, job: Job) -> None:
        """Takes a job."""
        (self._beams if job.settings.method == "beam" else self._waiting).append(job)

    def turn(self) -> None:
        """Does a little of everything: a group of beam searches, a group of new texts, some tokens of all texts."""
        if coming := _next(self._beams, self.arm.rows):
            try:
                self._search(coming)
            except Exception as error:
                _fail(coming, error)
        free = [place for place in range(self.arm.rows) if place not in self._writing]
        coming = _next(self._waiting, len(free))
        try:
            if coming:
                self._admit(coming, free)
            if self._writing:
                self._leaving |= {place for place, at in self._writing.items() if at.job.cancelled}
                progress = self._batch.run(STEPS, sorted(self._leaving))
                for place in self._leaving:
                    self._writing.pop(place, None)
                self._leaving.clear()
                self._deliver(progress)
        except Exception as error:
            # The arrays of the batch were given away to the program that failed: all of them begin anew.
            _fail([*coming, *(at.job for at in self._writing.values() if at.job not in coming)], error)
            self._writing.clear()
            self._leaving.clear()
            self._batch = self.arm.open_batch()

    def _search(self, jobs: list[Job]) -> None:
        read = self.arm.read([job.crop for job in jobs], [job.prompt for job in jobs], room=self.arm.most)
        said, prompts = self.arm.beams(read), np.asarray(read.valid).sum(1)
        for row, job in enumerate(jobs):
            whole = said.tokens[row, : said.length[row]].tolist()
            tokens = whole[: job.settings.most]
            ended = len(tokens) == len(whole) and len(whole) < said.tokens.shape[1]
            self._end(job, TextStream(self.arm.tokenizer, job.stops), tokens, (), ended, int(prompts[row]))

    def _admit(self, jobs: list[Job], free: list[int]) -> None:
        read = self.arm.read([job.crop for job in jobs], [job.prompt for job in jobs])
        prompts = np.asarray(read.valid).sum(1)
        of = [jobs[min(row, len(jobs) - 1)].settings for row in range(len(prompts))]
        settings = RowSettings(
            np.array([each.temperature for each in of], np.float32),
            np.array([each.top_p for each in of], np.float32),
            np.minimum([each.most for each in of], self.arm.context - prompts).astype(np.int32),
            np.array([each.seed for each in of], np.int32),
        )
        self._batch.admit(read, free[: len(jobs)], settings)
        for row, (place, job) in enumerate(zip(free, jobs, strict=False)):
            self._writing[place] = _Writing(job, TextStream(self.arm.tokenizer, job.stops), int(prompts[row]))

    def _deliver(self, progress: Progress) -> None:
        for place, at in list(self._writing.items()):
            done, length = bool(progress.done[place]), int(progress.length[place])
            ids = progress.tokens[place, :length].tolist()
            logprobs = progress.logprobs[place, :length].tolist()
            ended = bool(ids) and ids[-1] in self.arm.ends
            if ids and ids[-1] == self.arm.eos:
                ids, logprobs = ids[:-1], logprobs[:-1]
            pairs = tuple(zip(ids, logprobs, strict=True))
            if done:
                del self._writing[place]
                self._end(at.job, at.stream, ids, pairs, ended, at.prompt_tokens, at.sent)
            elif at.job.stream or at.job.stops:
                text = at.stream.feed(ids)
                if at.stream.stopped:
                    self._leaving.add(place)  # its place is free after the next steps; nothing more is sent of it
                    at.job.cancelled = True
                    rest = Piece(text, pairs[at.sent :])
                    self._answer(at.job, at.stream.text, rest, "stop", at.prompt_tokens, pairs)
                elif at.job.stream and text:
                    at.job.emit(Piece(text, pairs[at.sent :]))
                    at.sent = len(pairs)

    def _end(self, job, stream, ids, pairs, ended: bool, prompt_tokens: int, sent: int = 0) -> None:
        rest = stream.feed(ids, last=True)
        reason = "stop" if ended or stream.stopped else "length"
        self._answer(job, stream.text, Piece(rest, pairs[sent:]), reason, prompt_tokens, pairs, len(ids))

    def _answer(self, job, text, rest, reason, prompt_tokens, pairs, count=None) -> None:
        job.emit(Answered(text, rest, reason, prompt_tokens, len(pairs) if count is None else count, pairs))


def _next(queue: deque[Job], most: int) -> list[Job]:
    """Takes up to `most` jobs that somebody still waits for."""
    found: list[Job] = []
    while queue and len(found) < most:
        job = queue.popleft()
        if not job.cancelled:
            found.append(job)
    return found


def _fail(jobs: list[Job], error: Exception) -> None:
    for job in jobs:
        job.emit(Failed(error))
