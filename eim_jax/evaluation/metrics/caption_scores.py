"""COCO caption scores of a result file: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE by the reference scorers.

`python -m eim_jax.evaluation.metrics.caption_scores --results results.json --annotations captions.json` prints one
JSON object.
BLEU, ROUGE-L and CIDEr need no Java; METEOR and SPICE are the reference jars and are null, with the reason, without it.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from eim_jax.data.bad_items import text_problem
from eim_jax.data.text_files import identifier, read_json
from eim_jax.evaluation.metrics.java_scorers import (
    METEOR_JAR,
    SPICE_JARS,
    Tokenised,
    java_executable,
    meteor,
    package_folder,
    spice,
    tokenise_java,
)
from eim_jax.evaluation.metrics.ptb import ptb_captions

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")


def _check(results: Mapping[Hashable, Any], references: Mapping[Hashable, Sequence[str]]) -> None:
    if not results:
        raise ValueError("no results to score")
    unknown = [key for key in results if key not in references]
    if unknown:
        known = next(iter(references), None)
        raise ValueError(
            f"{len(unknown)} results for images that have no reference captions: {unknown[:5]!r}; "
            f"the references' ids look like {known!r}"
        )
    bare = [key for key in results if not references[key]]
    if bare:
        raise ValueError(f"no reference caption for {len(bare)} images: {bare[:5]!r}")
    wrong = [key for key, caption in results.items() if not isinstance(caption, str)]
    if wrong:
        raise ValueError(f"the caption is not a string for {len(wrong)} images: {wrong[:5]!r}")


def _tokenise(captions: dict[Hashable, list[str]], java: str | None) -> Tokenised:
    flat = [caption for group in captions.values() for caption in group]
    tokens = iter(ptb_captions(flat) if java is None else tokenise_java(flat, java))
    return {key: [next(tokens) for _ in group] for key, group in captions.items()}


def score(
    results: Mapping[Hashable, Any], references: Mapping[Hashable, Sequence[str]], *, java: bool = True
) -> dict[str, Any]:
    """Returns the COCO caption scores of one caption an image, as fractions (CIDEr: x10), by pycocoevalcap's scorers.

    Images that have references but no result are left out, as the reference does; the notes say how many.

    Args:
      results: caption of each image. An empty one is scored (zeros), and counted in the notes.
      references: at least one caption of every image in results.
      java: False to do without Java even where it is installed: Python tokens (the same), no METEOR, no SPICE.

    Returns:
      Bleu_1 ... SPICE, None where a score could not be had; and "notes", a dict that says why, and what tokenised.

    Raises:
      ValueError: no results, a result without references, a caption that is no string.

    >>> score({1: "a red cube", 2: "two balls"}, {1: ["a red cube"], 2: ["two balls"]}, java=False)["ROUGE_L"]
    1.0
    """
    _check(results, references)
    ids = [key for key in references if key in results]  # the reference's order: that of the annotations
    executable = java_executable() if java else None
    why_no_java = "Java was not asked for" if not java else "Java is not installed"
    notes = {"images": f"{len(ids)} results, of {len(references)} images with references"}

    def tokenise_both(executable: str | None) -> tuple[Tokenised, Tokenised]:
        truth = {key: list(references[key]) for key in ids}
        return _tokenise(truth, executable), _tokenise({key: [results[key]] for key in ids}, executable)

    try:
        truth, said = tokenise_both(executable)
        notes["tokeniser"] = "Stanford PTBTokenizer (Java)" if executable else f"PTB rules in Python ({why_no_java})"
    except (RuntimeError, OSError) as error:
        executable, why_no_java = None, f"Java does not work: {error}"
        truth, said = tokenise_both(None)
        notes["tokeniser"] = f"PTB rules in Python ({why_no_java})"

    empty = [key for key in ids if not said[key][0]]
    if empty:
        notes["empty"] = f"{len(empty)} results without a word: {empty[:5]!r}"
    if len(ids) == 1:
        notes["CIDEr"] = "always 0 for a single image: its idf is log(1/1)"

    by_java, why = _java_scores(truth, said, executable, why_no_java)
    scores = {**dict.fromkeys(METRICS), **_python_scores(truth, said), **by_java}
    return {**scores, "notes": {**notes, **why}}


def _python_scores(truth: Tokenised, said: Tokenised) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    with contextlib.redirect_stdout(sys.stderr):  # stdout carries one JSON object
        bleu, _ = Bleu(4).compute_score(truth, said, verbose=0)
        scores = {f"Bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
        scores["ROUGE_L"] = float(Rouge().compute_score(truth, said)[0])
        scores["CIDEr"] = float(Cider().compute_score(truth, said)[0])
    return scores


def _java_scores(
    truth: Tokenised, said: Tokenised, executable: str | None, why_no_java: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """METEOR and SPICE, None where they could not be had, and for these the reason."""
    scores, why = {}, {}
    for name, scorer, jars in (("METEOR", meteor, (METEOR_JAR,)), ("SPICE", spice, SPICE_JARS)):
        scores[name] = None
        missing = [jar for jar in jars if not (package_folder() / jar).is_file()]
        if executable is None:
            why[name] = why_no_java
        elif missing:
            why[name] = f"not in the installed pycocoevalcap: {', '.join(missing)}"
        else:
            try:
                value = scorer(truth, said, executable)
                scores[name] = value if math.isfinite(value) else None
                if scores[name] is None:
                    why[name] = "the reference's result is not a number: an image has no tuples"
            except RuntimeError as error:
                why[name] = str(error)
    return scores, why


def load_results(path: str | os.PathLike) -> dict[Hashable, str]:
    """Reads COCO's result format, a list of {"image_id", "caption"}.

    Raises:
      ValueError: another format, an entry without an id or a text, or two captions for one image; it names the file
        and the entry.
      OSError: the file cannot be read.
    """
    entries = read_json(path)
    form = 'a list of {"image_id": ..., "caption": ...}'
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not {form}, but a JSON {type(entries).__name__}")
    results: dict[Hashable, str] = {}
    twice: list[Hashable] = []
    for place, entry in enumerate(entries):
        name, caption = _entry(entry, f"{path} [{place}]", form)
        twice += [name] if name in results else []
        results[name] = caption
    if twice:
        raise ValueError(
            f"{path} has more than one caption for {len(set(twice))} images: {', '.join(map(str, twice[:5]))}"
        )
    return results


def load_references(paths: Sequence[str | os.PathLike]) -> dict[Hashable, list[str]]:
    """Reads the captions of one or several COCO annotation files, in the order of their images.

    Raises:
      ValueError: a file without "annotations" of captions, or an entry without an id or a text; it is named.
      OSError: a file cannot be read.
    """
    references: dict[Hashable, list[str]] = {}
    for path in paths:
        content = read_json(path)
        annotations = content.get("annotations") if isinstance(content, dict) else None
        images = content.get("images", []) if isinstance(content, dict) else []
        if not isinstance(annotations, list) or not annotations:
            raise ValueError(f'{path} has no "annotations" with captions')
        if not isinstance(images, list):
            raise ValueError(f'{path}: "images" is not a list of {{"id": ...}}, but a JSON {type(images).__name__}')
        for place, image in enumerate(images):
            name = _name(image.get("id") if isinstance(image, dict) else None)
            if name is None:
                raise ValueError(f'{path} images[{place}]: needs an "id", a text or a whole number')
            references.setdefault(name, [])
        for place, annotation in enumerate(annotations):
            name, caption = _entry(annotation, f"{path} annotations[{place}]", 'a {"image_id": ..., "caption": ...}')
            references.setdefault(name, []).append(caption)
    return {key: captions for key, captions in references.items() if captions}


def _entry(entry: Any, where: str, form: str) -> tuple[Hashable, str]:
    """The image id and the caption of an entry; a ValueError says which of them cannot be used."""
    if not isinstance(entry, dict) or not {"image_id", "caption"} <= entry.keys():
        raise ValueError(f"{where}: needs {form.removeprefix('a list of ')}")
    name, caption = _name(entry["image_id"]), entry["caption"]
    if name is None:
        raise ValueError(f'{where}: its "image_id" is not a text or a whole number, but {entry["image_id"]!r:.60}')
    if not isinstance(caption, str):
        raise ValueError(f"{where}: the caption of image {name!r:.60} is not a string, but {caption!r:.60}")
    if problem := text_problem(caption):
        raise ValueError(f"{where}: the caption of image {name!r:.60} {problem}")
    return name, caption


def _name(value: Any) -> Hashable | None:
    """An image's id as files hold it, a text or a number; tables write 5 as 5.0. None for what is no id."""
    if identifier(value) is None or (isinstance(value, str) and text_problem(value)):
        return None
    return int(value) if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Scores a result file and prints one JSON object."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", required=True, help='JSON list of {"image_id", "caption"}')
    parser.add_argument("--annotations", required=True, nargs="+", help="COCO caption annotation file(s)")
    parser.add_argument("--no-java", action="store_true", help="no METEOR and SPICE, even where Java is installed")
    options = parser.parse_args(arguments)
    try:
        results, references = load_results(options.results), load_references(options.annotations)
        try:
            scores = score(results, references, java=not options.no_java)
        except ValueError as error:
            raise ValueError(f"{options.results}: {error}") from error
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
