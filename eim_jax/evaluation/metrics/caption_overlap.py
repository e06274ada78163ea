"""How much a caption shares with the references: BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE."""

import contextlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from eim_jax.evaluation.metrics.metric import Metric, Rows, Value
from eim_jax.evaluation.metrics.ptb import ptb_captions

NGRAMS = 4


def bleu4(sums: np.ndarray) -> Value:
    """Returns BLEU-4 as coco-caption computes it.

    Args:
      sums: length, reference length, guessed n-grams (n = 1 to 4), right n-grams (n = 1 to 4) in the last axis.
    """
    length, reference = sums[..., 0] + 1e-15, sums[..., 1] + 1e-9
    guess, right = sums[..., 2 : 2 + NGRAMS], sums[..., 2 + NGRAMS :]
    precision = np.exp(np.mean(np.log((right + 1e-15) / (guess + 1e-9)), axis=-1))
    brevity = length / reference
    return precision * np.where(brevity < 1, np.exp(1 - 1 / brevity), 1.0)


def caption_rows(results: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, Rows]:
    """Returns the rows of Bleu_4 and CIDEr, by pycocoevalcap's scorers on PTB tokens.

    CIDEr's document frequencies stay those of all images: its value for one image is what the reference reports.

    Args:
      results: the caption of each image; the rows stand in this order.
      references: of each of these images.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider

    said = {key: ptb_captions([text]) for key, text in results.items()}
    truth = {key: ptb_captions(list(references[key])) for key in results}
    scorer = BleuScorer(n=NGRAMS)
    for key in results:
        scorer += (said[key][0], truth[key])
    bleu = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(other - length), other) for other in counts["reflen"])[1]
        bleu.append([length, closest, *counts["guess"], *counts["correct"]])
    with contextlib.redirect_stdout(sys.stderr):
        _, cider = Cider().compute_score(truth, said)
    return {"Bleu_4": bleu, "CIDEr": [[round(float(score), 5), 1] for score in cider]}


_SHOWN = {"factor": 100, "decimals": 1, "sense": 1, "unit": "points", "group": "Captioning scores"}
# What BLEU-4 sums up is left to the page's full table.
_SHORTER = {"terminal": None, "seeds": None, "summed_up_by": (frozenset({"Bleu_4"}),)}

METRICS = (
    *(Metric(f"Bleu_{n}", f"BLEU-{n}", **_SHOWN, **_SHORTER) for n in (1, 2, 3)),
    Metric("Bleu_4", "BLEU-4", **_SHOWN, value=bleu4),
    Metric("METEOR", "METEOR", **_SHOWN),
    Metric("ROUGE_L", "ROUGE-L", **_SHOWN, terminal="ROUGE_L"),
    Metric("CIDEr", "CIDEr", **_SHOWN),
    Metric("SPICE", "SPICE", **_SHOWN, seeds=None),
)
