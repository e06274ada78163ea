"""Claims about ScienceQA's prompts: every official form reads as its letters say, and nothing dangles."""

import dataclasses
import re

import pytest

from eim_jax.data.datasets.scienceqa_prompt import Problem, prompt

FIRE = Problem(
    id="7",
    question="Is it warm?",
    choices=("no", "yes"),
    answer=1,
    hint="A  hint.",
    lecture="Heat\nflows.",
    solution="So   yes.",
    caption="a fire",
)
Q, C, M = "Question: Is it warm?\n", "Context: A hint.\n", "Options: (A) no (B) yes\n"
LECTURE, SOLUTION, ANSWER = "Heat\\nflows.", "So yes.", "The answer is B."
INPUTS = {
    "CQM": C + Q + M,
    "QCM": Q + C + M,
    "QCML": f"{Q}{C}{M}BECAUSE: {LECTURE}\n",
    "QCME": f"{Q}{C}{M}BECAUSE: {SOLUTION}\n",
    "QCMLE": f"{Q}{C}{M}BECAUSE: {LECTURE} {SOLUTION}\n",
    "QCLM": f"{Q}{C}BECAUSE: {LECTURE}\n{M}",
    "QCEM": f"{Q}{C}BECAUSE: {SOLUTION}\n{M}",
    "QCLEM": f"{Q}{C}BECAUSE: {LECTURE} {SOLUTION}\n{M}",
}
OUTPUTS = {
    "A": ANSWER,
    "AL": f"{ANSWER} BECAUSE: {LECTURE}",
    "AE": f"{ANSWER} BECAUSE: {SOLUTION}",
    "ALE": f"{ANSWER} BECAUSE: {LECTURE} {SOLUTION}",
    "AEL": f"{ANSWER} BECAUSE: {SOLUTION} {LECTURE}",
    "LA": f"{LECTURE} {ANSWER}",
    "EA": f"{SOLUTION} {ANSWER}",
    "LEA": f"{LECTURE} {SOLUTION} {ANSWER}",
    "ELA": f"{SOLUTION} {LECTURE} {ANSWER}",
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_every_official_form_reads_as_its_letters_say(inputs, outputs):
    assert prompt(FIRE, f"{inputs}-{outputs}") == (INPUTS[inputs] + "Response:", OUTPUTS[outputs])


def test_the_default_form_is_lavins():
    assert prompt(FIRE) == prompt(FIRE, "QCM-ALE", use_caption=False)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_without_an_explanation_nothing_dangles(outputs):
    bare = dataclasses.replace(FIRE, lecture="", solution=" \n")
    for inputs in INPUTS:
        instruction, response = prompt(bare, f"{inputs}-{outputs}")
        assert response == ANSWER and instruction in (Q + C + M + "Response:", C + Q + M + "Response:")


def test_half_an_explanation_stands_alone():
    assert prompt(dataclasses.replace(FIRE, lecture=""))[1] == f"{ANSWER} BECAUSE: {SOLUTION}"
    assert prompt(dataclasses.replace(FIRE, solution=""))[1] == f"{ANSWER} BECAUSE: {LECTURE}"


@pytest.mark.parametrize(
    ("hint", "caption", "use_caption", "context"),
    [
        ("A hint.", "a fire", False, "A hint."),
        ("A hint.", "a fire", True, "A hint. a fire"),
        ("", "a fire", True, "a fire"),
        ("", "a fire", False, "N/A"),
        ("", "", True, "N/A"),
    ],
)
def test_the_context_is_hint_then_caption_or_not_available(hint, caption, use_caption, context):
    problem = dataclasses.replace(FIRE, hint=hint, caption=caption)
    assert prompt(problem, use_caption=use_caption)[0].split("\n")[1] == f"Context: {context}"


@pytest.mark.parametrize(
    "form",
    ["", "QCM", "QCMALE", "QCM-", "-A", "QC-A", "QCM-B", "QCMX-A", "QQCM-A", "QCM-AA", "QCM-LAE", "QCM-L", "qcm-a"],
)
def test_an_unknown_form_says_how_forms_are_written(form):
    with pytest.raises(ValueError, match=re.escape(f"form {form!r}: a form is written input-output, as in QCM-ALE")):
        prompt(FIRE, form)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "problem 7: question: the text is empty"),
        ({"choices": ("one",), "answer": 0}, "problem 7: choices: 1, needs 2 to 26"),
        ({"answer": 2}, "problem 7: answer: 2 is the index of no choice, needs 0 to 1"),
        ({"answer": -1}, "problem 7: answer: -1"),
    ],
)
def test_an_impossible_problem_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FIRE, **change)
