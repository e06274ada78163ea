"""Your own photos and captions by what our experiments recommend: all of CLIP's tokens, an ST stage, then loss_base.

python -m eim_jax.main --config=configs/photos_recommended.py --workdir=runs/photos \
    --config.data.annotations=captions.json --config.data.images=photos/

configs/photos.py is the paper's whole recipe; this leaves out what was not seen to help (docs/results/report.md): the
LM stage, CLIP's prompts and loss_IE, so that one queue is left of three. A tenth of the photos is held out and scored
while the last stage trains, and its best step is kept. The rate decides more than any loss: try 2e-4 and 1e-3
(--config.stages.base.lr) where you have photos enough to tell.
"""

import ml_collections

from eim_jax.config import Arm
from eim_jax.configs import clipcap_small_coco


def get_config() -> ml_collections.ConfigDict:
    config = clipcap_small_coco.get_config()
    arm = Arm(description="full features -> FFN -> LM, stages ST -> base", st_bias="uniform", sequence=("st", "base"))
    with config.unlocked():
        config.arm.recommended = vars(arm)
    config.arms = ("recommended",)
    for name in arm.sequence:
        stage = config.stages[name]
        stage.warmup_steps, stage.epochs, stage.lr = 20, 60, 5e-4
    config.stages.base.epochs = 20
    config.data.strip = True
    config.data.eval_annotations = ""
    config.data.eval_share = 0.1
    config.eval.every_epochs = 2.0
    config.eval.method = "none"
    config.checkpoint.keep, config.checkpoint.metric = "best", "eval/nll"
    config.checkpoint.every_steps = 200
    config.log_every = 20
    return config
