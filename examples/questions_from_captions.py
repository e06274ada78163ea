"""Short questions about photos, made from captions in COCO's form: rows for --config=vqa to try it on.

python examples/questions_from_captions.py captions.json questions.jsonl

A word that at least two of a photo's captions use is taken to be in it. Every photo is asked whether a person is in it;
where one animal, food, sport or room is named, it is asked which.
"""

import collections
import json
import re
import sys
from pathlib import Path

PEOPLE = {"person", "people", "man", "men", "woman", "women", "boy", "girl", "child", "children", "family", "player"}
# Question -> what may be seen: an answer and the words of captions that stand for it.
ANIMALS = {"bear": "bears", "cat": "", "dog": "poodle", "horse": "horses", "sheep": "lamb", "bird": "", "elephant": ""}
FOOD = {"pizza": "pizzas", "banana": "bananas", "broccoli": "", "carrots": "", "cake": ""}
SPORTS = {"tennis": "", "baseball": "", "skiing": "skis", "skateboarding": "skateboard", "soccer": ""}
KINDS = {
    "Which animal is in the picture?": ANIMALS,
    "Which food is in the picture?": FOOD,
    "Which sport is it?": SPORTS,
    "Which room is it?": {"kitchen": "", "bedroom": "", "bathroom": ""},
    "What carries people here?": {"motorcycle": "", "bicycle": "bike bikes", "bus": "buses", "boat": ""},
}


def questions(annotations: dict) -> list[dict[str, str]]:
    """Returns one row a question: image, question, answer."""
    names = {image["id"]: image["file_name"] for image in annotations["images"]}
    used: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for entry in annotations["annotations"]:
        used[entry["image_id"]].update(set(re.findall("[a-z]+", entry["caption"].lower())))
    rows = []
    for key, words in used.items():
        seen = {word for word, captions in words.items() if captions > 1}
        asked = [("Is there a person in the picture?", "yes" if seen & PEOPLE else "no")]
        for question, answers in KINDS.items():
            found = [answer for answer, others in answers.items() if seen & {answer, *others.split()}]
            asked += [(question, found[0])] if len(found) == 1 else []
        rows += [{"image": names[key], "question": question, "answer": answer} for question, answer in asked]
    return rows


def main(captions: str, out: str) -> None:
    """Reads a file of captions and writes the rows, one a line."""
    rows = questions(json.loads(Path(captions).read_text(encoding="utf-8")))
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} questions about {len({row['image'] for row in rows})} photos")


if __name__ == "__main__":
    main(*sys.argv[1:])
