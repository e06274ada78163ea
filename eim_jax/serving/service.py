"""What the server does with a request, whatever the route: from its JSON to jobs of the model's thread, and back."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from eim_jax.config import Config
from eim_jax.serving import conversation, pictures
from eim_jax.serving.chat_request import ChatRequest, Turn
from eim_jax.serving.engine import Engine
from eim_jax.serving.errors import RequestError, no_such_model
from eim_jax.serving.followed_run import FollowedRun
from eim_jax.serving.job import Call, Failed, Job, settings_of
from eim_jax.serving.nearest_keys import NearestKeys
from eim_jax.serving.served_arm import ServedArm

NEAREST = 4  # training samples that the page shows for each loss


@dataclass(frozen=True)
class Options:
    """What the operator chose.

    Attributes:
      api_key: that requests must carry, "" for none.
      max_waiting: requests that may wait for a place in the batch.
      max_body: bytes of a request's body.
      ignore_text: a run that captions passes over the words beside a picture.
      hosts: names by which the server may be called, empty for any; keeps web pages of other origins out.
    """

    api_key: str = ""
    max_waiting: int = 256
    max_body: int = 20 << 20
    ignore_text: bool = False
    hosts: tuple[str, ...] = ()


class Service:
    """The served arms of one run.

    Args:
      config: the run's.
      workdir: the run's.
      engine: with its arms; one that is trained meanwhile may come.
      options: the operator's.
      nearest: the queues, None where the training data were not loaded.

    Attributes:
      pending: why an arm is not served, by its name.
      run: its work directory, followed.
    """

    def __init__(
        self, config: Config, workdir: Path, engine: Engine, options: Options, nearest: NearestKeys | None = None
    ) -> None:
        self._config, self.workdir, self.engine, self.options = config, workdir, engine, options
        self.nearest = nearest
        self.pending: dict[str, str] = {}
        self.run = FollowedRun(config, workdir)
        self._decoders = anyio.CapacityLimiter(max(config.data.threads, 1))  # a large picture takes 250 MB

    @property
    def config(self) -> Config:
        """The run's, its seam settled once an arm is there."""
        return next((arm.inputs.config for arm in list(self.engine.arms.values())), self._config)

    @property
    def arms(self) -> dict[str, ServedArm]:
        """Those that answer."""
        return {name: arm for name, arm in list(self.engine.arms.items()) if name not in self.pending}

    def arm(self, name: str) -> ServedArm:
        """Returns a served arm; RequestError where there is none of this name."""
        if (why := self.pending.get(name)) is not None:  # the arm may arrive meanwhile
            raise RequestError(f"{name}: {why}", status=404, param="model", code="model_not_found")
        if name not in (arms := self.arms):
            raise no_such_model(name, list(arms))
        return arms[name]

    async def begin(self, request: ChatRequest) -> "Answer":
        """Checks what is asked, decodes the picture and puts the job into the model's queue.

        Args:
          request: as `read_request` read it.

        Raises:
          RequestError: it cannot be answered.
        """
        arm = self.arm(request.model)
        settings = settings_of(request, self.config.decode, self.config.seed, arm.most)
        asked, crop = await self._read(arm, request.turns)
        pictured = crop is not None
        ids = conversation.prompt_tokens(self.config.data, asked.prompt, pictured, arm.tokenizer, arm.longest_prompt)
        answer = Answer(self.engine)
        job = Job(arm.name, crop, ids, settings, request.stop, request.stream, answer.emit)
        answer.start(job)
        return answer

    async def likelihood(self, model: str, turns: Sequence[Turn], text: str) -> dict[str, Any]:
        """Returns how likely a text is to an arm as the answer to these turns: nats a token, and tokens."""
        arm = self.arm(model)
        asked, crop = await self._read(arm, turns)
        nll, count = await self._call(arm, lambda served: served.likelihood(crop, asked.prompt, text))
        return {"model": model, "nll": nll, "tokens": count}

    async def neighbours(self, model: str, turns: Sequence[Turn]) -> dict[str, Any]:
        """Returns the training samples whose keys are nearest to the turns' picture, for each loss of an arm."""
        arm = self.arm(model)
        if self.nearest is None:
            raise RequestError("the training data were not loaded: start the server with --neighbours", status=404)
        _, crop = await self._read(arm, turns)
        if crop is None:
            raise RequestError("nearest keys are those of a picture: send one", param="messages")
        nearest = self.nearest
        return {"model": model, "losses": await self._call(arm, lambda served: nearest.of(served, crop, NEAREST))}

    async def _read(self, arm: ServedArm, turns: Sequence[Turn]):
        """(what is asked, the picture as the vision tower reads it)."""
        asked = conversation.asked(self.config.data, turns, ignore_text=self.options.ignore_text)
        if asked.pictured is None:
            return asked, None
        size, fit = arm.vlm.visual.config.image_size, arm.inputs.fit
        decode = functools.partial(_crop, asked.pictured, size, fit)
        return asked, await anyio.to_thread.run_sync(decode, limiter=self._decoders)

    async def _call(self, arm: ServedArm, function: Callable[[ServedArm], Any]) -> Any:
        answer = Answer(self.engine)
        answer.start(Call(arm.name, function, answer.emit))
        async for event in answer.events():
            return event.value
        raise AssertionError("a call ends with a result or an error")


def _crop(turn: Turn, size: int, fit: Any):
    assert turn.picture is not None
    return pictures.crop(pictures.picture_bytes(turn.picture, turn.where), turn.where, size, fit)


class Answer:
    """What the model's thread says of one job, for the event loop that asked.

    Args:
      engine: that runs it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._job: Job | Call | None = None

    def start(self, job: Job | Call) -> None:
        """Gives the job to the engine."""
        self._engine.submit(job)
        self._job = job

    def emit(self, event: Any) -> None:
        """Takes an event from the model's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Any]:
        """Yields Piece, then Answered, or Result; raises what the job failed with. To leave it cancels the job."""
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Frees the job's place, if it still has one."""
        if self._job is not None:
            self._job.cancelled = True
