"""The embedded default with two losses of related work, each added from its own file: see docs/extend/losses.md.

python -m eim_jax.main --config=experiments/related.py --workdir=runs/related
"""

import copy

import ml_collections

from eim_jax.configs import miniature
from eim_jax.losses.table import LOSSES
from experiments.sea import WordLoss
from experiments.viral import VisualAlignment

WORDS, VIRAL = WordLoss(), VisualAlignment(hidden=256)


def get_config() -> ml_collections.ConfigDict:
    """EIM's features and ST, trained by loss_W, then by loss_base with loss_VRA; the baseline beside it."""
    LOSSES.update({loss.name: loss for loss in (WORDS, VIRAL)})
    config = miniature.get_config()
    sea, aligned = copy.deepcopy(config.stages.st), copy.deepcopy(config.stages.base)
    sea.losses.update(st=0.0, words=1.0)
    aligned.losses.viral = 0.5
    aligned.train = (*aligned.train, "loss/.*")
    config.stages.update(sea=sea, aligned=aligned)
    config.arm.eim.update(
        description="full features -> FFN -> LM, trained in stages loss_W, then loss_base with loss_VRA",
        prompts=0,
        sequence=("sea", "aligned"),
    )
    return config
