"""A request's turns as what an arm was trained to read: a picture alone, or an instruction in the run's own form."""

from collections.abc import Sequence
from typing import NamedTuple

from eim_jax.config import Data
from eim_jax.data import rows
from eim_jax.data.datasets import chat_prompt, data_set
from eim_jax.serving.chat_request import Turn
from eim_jax.serving.errors import RequestError


class Asked(NamedTuple):
    """The prompt, "" for a caption, and the turn that holds the picture, None for none."""

    prompt: str
    pictured: Turn | None


def captions(data: Data) -> bool:
    """Whether a run captions pictures: its samples have no instruction."""
    return data_set(data).prompt is None


def several_turns(data: Data) -> bool:
    """Whether a run was trained on conversations of several turns."""
    if captions(data):
        return False
    return chat_prompt(data, "b", [("a", "c")]) != chat_prompt(data, "b")


def asked(data: Data, turns: Sequence[Turn], *, ignore_text: bool = False) -> Asked:
    """Writes a request's turns as the run was trained to read them.

    Args:
      data: the run's `config.data`, its seam settled.
      turns: the request's.
      ignore_text: a run that captions passes over the words beside the picture.

    Raises:
      RequestError: the run cannot be asked so; the message says how it can.
    """
    pictured = [turn for turn in turns if turn.picture is not None]
    if len(pictured) > 1:
        message = f"{pictured[1].where}: a second picture, but an arm looks at one: start a new conversation"
        raise RequestError(message, param=pictured[1].where)
    picture = pictured[0] if pictured else None
    if captions(data):
        _check_caption(turns, picture, ignore_text)
        return Asked("", picture)
    return Asked(_prompt(data, turns), picture)


def _check_caption(turns: Sequence[Turn], picture: Turn | None, ignore_text: bool) -> None:
    if picture is None:
        raise RequestError("this run captions pictures: send one as an image_url part", param="messages")
    wordy = next((turn for turn in turns if turn.text.strip() or turn.role == "assistant"), None)
    if wordy is not None and not ignore_text:
        raise RequestError(
            f"{wordy.where}: this run captions pictures and reads no words: send the picture alone, or start the "
            "server with --ignore_text (lmms-eval: ignore_text=True)",
            param=wordy.where,
        )


def _prompt(data: Data, turns: Sequence[Turn]) -> str:
    spoken = []
    for turn in turns:
        if turn.role != "system":
            spoken.append(turn)
        elif turn.text.strip():
            raise RequestError(
                f"{turn.where}: this run's conversations have no system prompt: leave it out, or ask it as a question",
                param=turn.where,
            )
    for i, turn in enumerate(spoken):
        wanted = "user" if i % 2 == 0 else "assistant"
        if turn.role != wanted:
            message = f"{turn.where}: turns alternate from the user's on; here a message of the {wanted} is needed"
            raise RequestError(message, param=turn.where)
        if not turn.text.strip():
            raise RequestError(f"{turn.where}: it has no words: this run answers questions", param=turn.where)
    if len(spoken) % 2 == 0:
        raise RequestError("messages must end with a user's", param="messages")
    *before, question = [turn.text for turn in spoken]
    if before and not several_turns(data):
        raise RequestError(
            "this run was trained on single questions: send the last one alone, without the turns before it",
            param="messages",
        )
    return chat_prompt(data, question, list(zip(before[::2], before[1::2], strict=True)))


def prompt_tokens(data: Data, prompt: str, pictured: bool, tokenizer, most: int) -> list[int]:
    """Returns a prompt's ids.

    Args:
      data: the run's `config.data`.
      prompt: as `asked` wrote it.
      pictured: whether a picture stands before it.
      tokenizer: the LM's.
      most: tokens that the LM's context has room for.

    Raises:
      RequestError: it is longer than that, or than the run's texts may be, or the tokenizer's chat template refuses it.
    """
    try:
        ids = rows.prompt_ids([prompt], tokenizer, data.seam)[0]
    except ValueError as error:
        raise RequestError(f"messages: {error}", param="messages") from error
    longest = min(rows.limit(data, pictured), most) if prompt else 0
    if len(ids) > longest:
        raise RequestError(
            f"the conversation has {len(ids):,} tokens, this run reads at most {longest:,} (config.data.max_tokens)",
            param="messages",
            code="context_length_exceeded",
        )
    return ids
