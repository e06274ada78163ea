"""The body of a chat completion, read and checked field by field: nothing that it asks for is passed over."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eim_jax.serving.errors import RequestError

# Fields that change nothing of an answer.
_NOTES = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that are taken with the value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_STOPS = 4  # OpenAI's limit
METHODS = ("greedy", "beam", "nucleus")


@dataclass(frozen=True)
class Turn:
    """One message: who, the words, and the data URL of a picture."""

    role: str
    text: str
    picture: str | None
    where: str  # in the request, for messages


@dataclass(frozen=True)
class ChatRequest:
    """What is asked, None where the request leaves it to the run's own decoding.

    Attributes:
      model: the arm.
      turns: the conversation, the last one a user's.
      method: "greedy", "beam" or "nucleus".
      stream: the answer is sent in pieces as it is written.
      usage_at_end: a streamed answer ends with the token counts.
      logprobs: the tokens' log-probabilities are wanted.
    """

    model: str
    turns: tuple[Turn, ...]
    method: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    usage_at_end: bool = False
    logprobs: bool = False


def read_request(body: Any) -> ChatRequest:
    """Reads a request's JSON.

    Args:
      body: as parsed.

    Raises:
      RequestError: names the field that is missing, of another type, out of range, or not known.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object with model and messages")
    given = {name: value for name, value in body.items() if value is not None}
    _refuse_unknown(given)
    if not isinstance(given.get("model"), str):
        raise RequestError("model must be the name of an arm; GET /v1/models lists them", param="model")
    limits = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(limits) > 1:
        raise RequestError("give max_tokens or max_completion_tokens, not both", param="max_tokens")
    request = ChatRequest(
        model=given["model"],
        turns=_turns(given.get("messages")),
        method=_method(given),
        temperature=_number(given, "temperature", 0, 2),
        top_p=_number(given, "top_p", 0, 1),
        max_tokens=_whole(given, limits[0], 1, 1 << 30) if limits else None,
        stop=_stops(given.get("stop")),
        seed=_whole(given, "seed", 0, (1 << 31) - 1),
        stream=_flag(given, "stream"),
        usage_at_end=_flag(given.get("stream_options", {}), "include_usage", "stream_options."),
        logprobs=_flag(given, "logprobs"),
    )
    _check_method(request)
    return request


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    known = {"model", "messages", "method", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop"}
    known |= {"seed", "stream", "stream_options", "logprobs", *_NOTES}
    for name, value in given.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                offered = " or ".join(map(repr, _NEUTRAL[name]))
                message = f"{name}={value!r}: not offered here, leave it out or give {offered}"
                raise RequestError(message, param=name, code="unsupported_value")
        elif name not in known:
            raise RequestError(f"unrecognized request argument: {name}", param=name, code="unknown_parameter")


def _turns(messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    return tuple(_turn(message, f"messages[{i}]") for i, message in enumerate(messages))


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
        raise RequestError(f"{where}: role must be system, user or assistant", param=where)
    role = "system" if message["role"] == "developer" else message["role"]
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError(f"{where}.content must be a string or a list of parts", param=f"{where}.content")
    words, pictures = [], []
    for i, part in enumerate(parts):
        place = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            words.append(_clean(part["text"], place))
        elif kind == "image_url" and isinstance(url := _url(part), str):
            pictures.append((url, place))
        else:
            raise RequestError(
                f"{place}: a part is {{'type': 'text', 'text': ...}} or "
                "{'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,...'}}",
                param=place,
            )
    if len(pictures) > 1:
        raise RequestError(f"{where}: {len(pictures)} pictures, but an arm looks at one", param=pictures[1][1])
    if pictures and role != "user":
        raise RequestError(f"{where}: a picture belongs to a user's message", param=pictures[0][1])
    return Turn(role, "\n".join(words), pictures[0][0] if pictures else None, where)


def _url(part: Mapping[str, Any]) -> Any:
    holder = part.get("image_url")
    return holder.get("url") if isinstance(holder, dict) else holder


def _clean(text: str, where: str) -> str:
    """The text; half a character, which no tokenizer takes, is refused."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: half a character (a lone surrogate) at {error.start}", param=where) from None
    if "\0" in text:
        raise RequestError(f"{where}: the character NUL is no text", param=where)
    return text


def _method(given: Mapping[str, Any]) -> str | None:
    method = given.get("method")
    if method is not None and method not in METHODS:
        raise RequestError(f"method must be one of {', '.join(METHODS)}", param="method")
    return method


def _check_method(request: ChatRequest) -> None:
    """Refuses settings that the method would not read."""
    sampled = [name for name in ("temperature", "top_p", "seed") if getattr(request, name) is not None]
    if request.method == "beam" and sampled:
        raise RequestError(f"method='beam' samples nothing: leave {', '.join(sampled)} out", param=sampled[0])
    if request.method == "greedy" and request.temperature:
        raise RequestError("method='greedy' with a temperature above 0: give one of them", param="temperature")
    if request.method == "nucleus" and request.temperature == 0:
        raise RequestError("method='nucleus' with temperature=0, which is greedy: give one", param="temperature")


def _number(given: Mapping[str, Any], name: str, low: int, high: int) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isnan(value):
        raise RequestError(f"{name} must be a number from {low} to {high}", param=name)
    return float(value)


def _whole(given: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high:,}", param=name)
    return value


def _flag(given: Any, name: str, before: str = "") -> bool:
    value = given.get(name, False) if isinstance(given, dict) else None
    if not isinstance(value, bool):
        raise RequestError(f"{before}{name} must be true or false", param=f"{before}{name}")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops) or len(stops) > _STOPS:
        raise RequestError(f"stop must be a text or a list of at most {_STOPS}, none of them empty", param="stop")
    return tuple(stops)
