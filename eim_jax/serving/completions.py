"""Answers in OpenAI's form: one object, or a stream of chunks."""

import time
import uuid
from typing import Any

from eim_jax import __version__
from eim_jax.serving.chat_request import ChatRequest
from eim_jax.serving.job import Answered, Piece

FINGERPRINT = f"eim_jax-{__version__}"


class Completion:
    """The forms of one answer.

    Args:
      request: what was asked.
      tokenizer: the LM's, for the tokens of `logprobs`.
    """

    def __init__(self, request: ChatRequest, tokenizer: Any) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, answer: Answered) -> dict[str, Any]:
        """Returns the answer as one object."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer)}

    def first(self) -> dict[str, Any]:
        """Returns a stream's first chunk: who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> dict[str, Any]:
        """Returns a piece of a stream as a chunk."""
        return self._chunk({"content": piece.text}, self._logprobs(piece.tokens))

    def last(self, answer: Answered) -> list[dict[str, Any]]:
        """Returns a stream's end: what is left of the text, why it ends, and the counts where they were asked for."""
        chunks = [self.piece(answer.rest)] if answer.rest.text or answer.rest.tokens else []
        chunks.append(self._chunk({}, reason=answer.reason))
        if self._request.usage_at_end:
            chunks.append({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)})
        return chunks

    def _chunk(self, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}
        return {**head, "system_fingerprint": FINGERPRINT}

    def _logprobs(self, tokens: tuple[tuple[int, float], ...]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        said = []
        for token, logprob in tokens:
            text = self._tokenizer.decode([token])
            said.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
        return {"content": said, "refusal": None}


def usage(answer: Answered) -> dict[str, int]:
    """Returns the token counts of an answer.

    `prompt_tokens` are all slots that the LM reads before it, those of the picture included; the token that ends an
    answer is not counted.
    """
    read, written = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
