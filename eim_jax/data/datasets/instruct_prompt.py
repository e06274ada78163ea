"""How a question is written as an instruction: in LaVIN's words, in Alpaca's, in one's own, or by the tokenizer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from eim_jax.data.conversation import TOKENIZER, message, written
from eim_jax.data.datasets.scienceqa_prompt import halved_spaces


class Question(NamedTuple):
    """What is asked, as it stands in the file: an instruction and, in Alpaca's form alone, its input, "" for none."""

    instruction: str
    input: str | None = None


@dataclass(frozen=True)
class Template:
    """The words around a question.

    Attributes:
      turn: a question up to where its answer begins, with {instruction} and {input}.
      bare: the same of a question without input.
      keeps_input: in Alpaca's form an empty input is written too, with what stands around it.
      after: stands between an earlier answer and the next question.
      preface: before the first question; `bare_preface` where that one has no input. A row's own system prompt
        replaces it.
      system_end: between a row's own system prompt and the first question.
      tidy: instruction and input are stripped of white space at their ends.
      finish: what is done to the prompt's whole text at last.
    """

    turn: str
    bare: str
    after: str = "\n"
    preface: str = ""
    bare_preface: str = ""
    system_end: str = "\n"
    tidy: bool = False
    keeps_input: bool = False
    finish: Callable[[str], str] = lambda text: text

    def write(self, asked: Question, earlier: Sequence[tuple[Question, str]] = (), system: str = "") -> str:
        """Returns the prompt of a question.

        Args:
          asked: the question.
          earlier: the (question, answer) turns before it, each answer as it follows its prompt (rows.earlier_turns).
          system: the row's own system prompt, "" for none.
        """
        asked, *before = (self._tidied(question) for question in (asked, *(question for question, _ in earlier)))
        preface = self.preface if (before or [asked])[0].input else self.bare_preface
        parts = [system + self.system_end if system else preface]
        for question, (_, answer) in zip(before, earlier, strict=True):
            parts.append(self._turn(question) + answer + self.after)
        return self.finish("".join([*parts, self._turn(asked)]))

    def _tidied(self, asked: Question) -> Question:
        return Question(asked.instruction.strip(), (asked.input or "").strip()) if self.tidy else asked

    def _turn(self, asked: Question) -> str:
        form = self.turn if asked.input or (self.keeps_input and asked.input is not None) else self.bare
        # Not str.format: a question may hold braces, and one's own template too.
        return re.sub(r"\{(instruction|input)\}", lambda found: getattr(asked, found[1]) or "", form)


class Conversation:
    """Turns as they are: the LM's tokenizer writes the words around them (data/chat_form.py)."""

    def write(self, asked: Question, earlier: Sequence[tuple[Question, str]] = (), system: str = "") -> str:
        """Returns the conversation up to the answer as an instruction (data/conversation.py).

        Args:
          asked: the question.
          earlier: the (question, answer) turns before it.
          system: the row's own system prompt, "" for none.
        """
        turns = [message("system", system)] if system else []
        for question, answer in earlier:
            turns += [message("user", self._words(question)), message("assistant", answer)]
        return written([*turns, message("user", self._words(asked))])

    def _words(self, question: Question) -> str:
        return "\n".join(filter(None, (question.instruction, question.input)))


_REQUEST = "Write a response that appropriately completes the request.\n\n"
_ALPACA = "### Instruction:\n{instruction}\n\n"
TEMPLATES: dict[str, Template | Conversation] = {
    # LaVIN's words, without its stray spaces.
    "plain": Template(
        "Instruction: {instruction} {input}\nResponse:", "Instruction: {instruction}\nResponse:", tidy=True
    ),
    # LaVIN's tools/data_processing.py to the letter: Alpaca's rows keep the space before an empty input; every two
    # spaces become one, once.
    "lavin": Template(
        "Instruction: {instruction} {input}\nResponse:",
        "Instruction: {instruction}\nResponse:",
        keeps_input=True,
        finish=halved_spaces,
    ),
    # Stanford Alpaca's and LLaMA-Adapter's.
    "alpaca": Template(
        _ALPACA + "### Input:\n{input}\n\n### Response:",
        _ALPACA + "### Response:",
        after="\n\n",
        preface="Below is an instruction that describes a task, paired with an input that provides further context. "
        + _REQUEST,
        bare_preface="Below is an instruction that describes a task. " + _REQUEST,
        system_end="\n\n",
    ),
    TOKENIZER: Conversation(),
}


def template_of(name: str) -> Template | Conversation:
    r"""Returns a template by its name in TEMPLATES, or the one that a text of one's own is.

    The text holds {instruction} and, for the input of Alpaca's form, {input}; without the second, an input follows the
    instruction behind a line break. It ends where the answer begins, without white space (see `data.seam`).

    Raises:
      ValueError: it is neither.

    >>> template_of("USER: {instruction}\nASSISTANT:").write(Question("Add.", "1 + 1"))
    'USER: Add.\n1 + 1\nASSISTANT:'
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{instruction}" not in name:
        raise ValueError(
            f"template {name!r}: neither one of {', '.join(TEMPLATES)} nor a text with {{instruction}} in it"
        )
    if name[-1].isspace():
        raise ValueError(
            f"template {name!r} ends with white space: leave it out, the answer follows as config.data.seam says"
        )
    turn = name if "{input}" in name else name.replace("{instruction}", "{instruction}\n{input}")
    return Template(turn, re.sub(r"\s*\{input\}", "", name), tidy=True)


def prompt(
    question: str | Question,
    earlier: Sequence[tuple[str | Question, str]] = (),
    *,
    template: str = "plain",
    system: str = "",
) -> str:
    r"""Returns the instruction text of a question, after the (question, answer) turns before it.

    An answer follows its prompt as it is given: without a space, as in LaVIN's training text, or with the one that
    `rows.earlier_turns` puts before it.

    >>> prompt("And its shape?", [("Which colour is it?", "Red.")])
    'Instruction: Which colour is it?\nResponse:Red.\nInstruction: And its shape?\nResponse:'
    """
    turns = [(_as_question(asked), answered) for asked, answered in earlier]
    return template_of(template).write(_as_question(question), turns, system)


def _as_question(question: str | Question) -> Question:
    return question if isinstance(question, Question) else Question(question)


def single_turn(own: Any, question: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
    """Returns the instruction of a question alone, for data sets of single turns (`DataSet.prompt`)."""
    return prompt(question)
