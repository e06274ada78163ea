"""A question with options, and the text that a model reads and writes for it: ScienceQA's forms, in LaVIN's words."""

import dataclasses
import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One question of ScienceQA: `choices[answer]` is right; the fields are those of problems.json.

    `image` is the id of its image in the split (of the official data: the file, "test/5/image.png"), None for text
    only. `grade` reads "grade3". `lecture` (general) and `solution` (of this question) explain the answer; `caption` is
    a machine's description of the image. What is unknown is None or "".

    Raises:
      ValueError: an empty question, fewer than 2 or more than 26 choices, or an answer that is none of them; id and
        field are named.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    image: str | None = None
    subject: str | None = None
    grade: str | None = None
    topic: str | None = None
    category: str | None = None
    skill: str | None = None
    lecture: str = ""
    solution: str = ""
    caption: str = ""

    def __post_init__(self):
        """Refuses what the class docstring names."""
        found = fault(self.question, len(self.choices), self.answer)
        if found is not None:
            raise ValueError(f"problem {self.id}: {found}")


def fault(question: str, n_choices: int, answer: int) -> str | None:
    """Returns what is wrong with these fields of a problem, naming the field, or None."""
    if not question.strip():
        return "question: the text is empty"
    if not 2 <= n_choices <= len(LETTERS):
        return f"choices: {n_choices}, needs 2 to {len(LETTERS)}"
    if not 0 <= answer < n_choices:
        return f"answer: {answer} is the index of no choice, needs 0 to {n_choices - 1}"
    return None


def parse_form(form: str) -> tuple[str, str]:
    """Returns the input and the output letters of a form such as "QCM-ALE"; ValueError says how forms are written.

    All of the official code's forms are among them (CQM, QCM, QCML, QCME, QCMLE, QCLM, QCEM, QCLEM; A, AL, AE, ALE,
    AEL, LA, EA, LEA, ELA).
    """
    inputs, dash, outputs = form.partition("-")
    known = set(inputs) <= set("QCMLE") and set(outputs) <= set("ALE")
    once = len(set(inputs)) == len(inputs) and len(set(outputs)) == len(outputs)
    if not (dash and known and once and set("QCM") <= set(inputs) and "A" in outputs[:1] + outputs[-1:]):
        raise ValueError(
            f"form {form!r}: a form is written input-output, as in QCM-ALE, CQM-A or QCMLE-A. Input: Q (question), "
            "C (context) and M (multiple choice) in any order, L (lecture) or E (explanation) where they are given "
            "away; output: A (answer) first or last, with L and E or without; no letter twice on a side"
        )
    return inputs, outputs


def is_official(wording: str) -> bool:
    """Returns whether the strings are the authors'; ValueError for another word than "tidy" and "official"."""
    if wording not in ("tidy", "official"):
        raise ValueError(f"wording {wording!r} is neither 'tidy' nor 'official'")
    return wording == "official"


def prompt(
    problem: Problem, form: str = "QCM-ALE", use_caption: bool = False, wording: str = "tidy"
) -> tuple[str, str]:
    r"""Returns the instruction, which ends with "Response:", and the response, which starts without a space.

    QCM-ALE: "Question: {q}\nContext: {hint or N/A}\nOptions: (A) {x} (B) {y}\nResponse:" and "The answer is B.
    BECAUSE: {lecture} {solution}" (LaVIN, ScienceQA). `use_caption` adds the machine
    caption to the context. Line breaks of lecture and solution are written as the two characters \n.

    `wording` "tidy": runs of spaces become one; without an explanation there is no "BECAUSE:"; L is the lecture and E
    the solution throughout. "official": the strings of the authors' code and of LaVIN, to the letter: every two spaces
    become one, once; "BECAUSE:" stands without an explanation too; AL gives the solution and AE the lecture.

    >>> prompt(Problem("1", "Which is warm?", ("ice", "fire"), 1), "QCM-A")
    ('Question: Which is warm?\nContext: N/A\nOptions: (A) ice (B) fire\nResponse:', 'The answer is B.')
    >>> prompt(Problem("1", "Which is warm?", ("ice", "fire"), 1), "QCM-ALE", wording="official")[1]
    'The answer is B. BECAUSE:'
    """
    official = is_official(wording)
    inputs, outputs = parse_form(form)
    context = " ".join([problem.hint, problem.caption if use_caption else ""]).strip()
    lines = {
        "Q": f"Question: {problem.question}",
        "C": f"Context: {context or 'N/A'}",
        "M": "Options: " + " ".join(f"({LETTERS[k]}) {choice}" for k, choice in enumerate(problem.choices)),
    }
    parts = []
    for part in re.findall("[QCM]|[LE]+", inputs):  # neighbouring L and E share a line
        given = lines[part] if part in lines else _because(_explanation(problem, part, official), official)
        parts += [given] if given else []
    answer = answer_sentence(problem.answer)
    letters = outputs.replace("A", "")
    if official:
        letters = {"AL": "E", "AE": "L"}.get(outputs, letters)
    explained = _explanation(problem, letters, official)
    behind = _because(explained, official) if letters else ""
    response = " ".join([answer, behind] if outputs[0] == "A" else [explained, answer])
    spaces = halved_spaces if official else _single_spaces
    return spaces("\n".join([*parts, "Response:"])).strip(), spaces(response).strip()


def answer_sentence(option: int) -> str:
    """Returns what names an option in every form.

    >>> answer_sentence(1)
    'The answer is B.'
    """
    return f"The answer is {LETTERS[option]}."


def halved_spaces(text: str) -> str:
    """Returns the text with every two spaces as one, once: LaVIN's and ScienceQA's own way.

    >>> halved_spaces("a  b   c    d")
    'a b  c  d'
    """
    return text.replace("  ", " ")


def _explanation(problem: Problem, letters: str, official: bool) -> str:
    texts = [{"L": problem.lecture, "E": problem.solution}[letter] for letter in letters]
    return " ".join(text.replace("\n", "\\n") for text in texts if official or text.strip())


def _because(explanation: str, official: bool) -> str:
    return f"BECAUSE: {explanation}" if official or explanation else ""


def _single_spaces(text: str) -> str:
    return re.sub(" {2,}", " ", text)
