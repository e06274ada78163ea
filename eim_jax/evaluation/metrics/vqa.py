"""VQA accuracy: how many of ten people gave the answer, as the rule of the VQA challenge counts (Antol et al., 2015).

An answer is worth min(matches / 3, 1), averaged over the ten sets of nine people that leave one out. Both sides are
normalised first as the challenge describes it: lower case; no full stop unless a digit follows; number words as digits;
no articles; a missing apostrophe of a contraction is put back; other punctuation becomes a space, or nothing where a
space stands beside it or the text has a comma between digits. (The challenge's script leaves both sides alone where all
ten people agree to the letter.)
"""

import re
from collections.abc import Sequence

PEOPLE = 10  # answers of a question, by the rule
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Each with one of its apostrophes left out. Those whose bare form is a word of its own (we'll, she'd) are not listed.
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, sign in enumerate(word)
    if sign == "'"
}


def normalised(answer: str) -> str:
    """Returns an answer as the rule compares it.

    >>> normalised("The  two dogs."), normalised("Isnt it 3,000?"), normalised("black/white")
    ('2 dogs', "isn't it 3000", 'black white')
    """
    text = " ".join(answer.split())
    joined = re.search(r"\d,\d", text) is not None
    kept = text
    for sign in _PUNCTUATION:
        beside_a_space = f"{sign} " in text or f" {sign}" in text
        kept = kept.replace(sign, "" if beside_a_space or joined else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)
    words = (_DIGITS.get(word, word) for word in kept.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """Returns what an answer is worth, 0 to 1.

    Args:
      answer: the model's.
      people: ten answers.

    Raises:
      ValueError: there are not ten.

    >>> round(accuracy("2", ["two"] * 2 + ["3"] * 8), 3)
    0.6
    """
    if len(people) != PEOPLE:
        raise ValueError(f"VQA's rule takes the answers of {PEOPLE} people, not {len(people)}")
    matches = [normalised(said) == normalised(answer) for said in people]
    return sum(min((sum(matches) - own) / 3, 1.0) for own in matches) / len(people)
