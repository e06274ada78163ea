"""How a question is written as an instruction: the form of LaVIN's chatbot."""

from collections.abc import Sequence
from typing import Any


def prompt(question: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
    r"""Returns the instruction text of a question, after the (question, answer) turns before it.

    The answer follows without a space, as in LaVIN's training text.

    >>> prompt("And its shape?", [("Which colour is it?", "Red.")])
    'Instruction: Which colour is it?\nResponse:Red.\nInstruction: And its shape?\nResponse:'
    """
    turns = "".join(f"Instruction: {asked}\nResponse:{answered}\n" for asked, answered in earlier)
    return f"{turns}Instruction: {question}\nResponse:"


def single_turn(own: Any, question: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
    """Returns the instruction of a question alone, for data sets of single turns (`DataSet.prompt`)."""
    return prompt(question)
