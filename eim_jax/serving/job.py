"""What the model's thread is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from eim_jax.config import Decode
from eim_jax.serving.chat_request import ChatRequest
from eim_jax.serving.errors import RequestError


class Piece(NamedTuple):
    """The next piece of a streamed answer, with the log-probabilities of the tokens that came with it."""

    text: str
    tokens: tuple[tuple[int, float], ...] = ()


class Answered(NamedTuple):
    """The end of an answer; `text` is the whole one, and of a streamed one `rest` is still to be sent."""

    text: str
    rest: Piece
    reason: str  # "stop" or "length"
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[tuple[int, float], ...]


class Failed(NamedTuple):
    """The job came to no answer."""

    error: Exception


class Result(NamedTuple):
    """What a `Call` returned."""

    value: Any


class Settings(NamedTuple):
    """How an answer is decoded."""

    method: str
    temperature: float
    top_p: float
    most: int
    seed: int


def settings_of(request: ChatRequest, decode: Decode, seed: int, most: int) -> Settings:
    """Returns how a request is decoded: what it leaves open is the run's own decoding.

    Args:
      request: what is asked.
      decode: the run's `config.decode`.
      seed: the run's.
      most: most tokens of an answer; a request for more ends there, and its finish_reason says so.

    Raises:
      RequestError: beams with log-probabilities, which they do not keep.
    """
    method = request.method
    if method is None:
        drawn = [value for value in (request.temperature, request.top_p, request.seed) if value is not None]
        method = decode.methods[0] if not drawn else "greedy" if request.temperature == 0 else "nucleus"
    if method == "beam" and request.logprobs:
        raise RequestError(
            "the beam search keeps no log-probabilities of single tokens: set temperature=0, or leave logprobs out",
            param="logprobs",
        )
    warm = decode.temperature if request.temperature is None else request.temperature
    return Settings(
        method=method,
        temperature=warm if method == "nucleus" else 0.0,
        top_p=decode.top_p if request.top_p is None else request.top_p,
        most=most if request.max_tokens is None else min(request.max_tokens, most),
        seed=seed if request.seed is None else request.seed,
    )


@dataclass(eq=False)
class Job:
    """An answer that is wanted; `emit` takes Piece, Answered or Failed, and is called by the model's thread.

    Attributes:
      arm: which.
      crop: the picture as the vision tower reads it, None for none.
      prompt: its ids.
      settings: of the decoding.
      stops: texts before which the answer ends.
      stream: pieces are wanted as they come.
      cancelled: nobody waits any more.
    """

    arm: str
    crop: UInt8[np.ndarray, "h w 3"] | None
    prompt: list[int]
    settings: Settings
    stops: tuple[str, ...]
    stream: bool
    emit: Callable[[Any], None]
    cancelled: bool = False


@dataclass(eq=False)
class Call:
    """A function that the model's thread calls with the served arm; `emit` takes Result or Failed."""

    arm: str
    function: Callable[[Any], Any]
    emit: Callable[[Any], None]
    cancelled: bool = False
