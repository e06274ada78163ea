"""Your own photos and captions with a small instruct model: CLIP, an MLP, SmolLM2-135M-Instruct with LoRA.

python -m eim_jax.main --config=configs/photos_smollm2.py --workdir=runs/photos \
    --config.data.annotations=captions.json --config.data.images=photos/

The language model keeps its own weights; connector and low-rank terms are trained, so that a few hundred photos do
not undo what it knows. A tenth of the photos is held out and scored while the last stage trains; the best step is
kept. With a few dozen photos train the connector alone:
--config.arm.eim.lora="()" --config.stages.ie.train="('st/.*',)"
"""

import ml_collections

from eim_jax.config import Arm
from eim_jax.configs import photos, vqa


def get_config() -> ml_collections.ConfigDict:
    config = photos.get_config()
    config.towers.lm = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.towers.dropout = 0.0
    arm = Arm(
        description="EIM: CLIP tokens -> MLP -> SmolLM2 with LoRA, trained in stages ST -> IE",
        st="ffn",
        st_hidden=576,
        st_bias="uniform",
        lora=("lm/blocks.*",),
        lora_rank=8,
        sequence=("st", "ie"),
    )
    with config.unlocked():
        config.arm.eim = vars(arm)
    config.stages.ie.train = (vqa.ST, vqa.LOW_RANK)
    config.stages.ie.epochs = 20
    config.data.eval_share = 0.1
    config.eval.every_epochs = 2.0
    config.eval.method = "none"
    config.checkpoint.keep, config.checkpoint.metric = "best", "eval/nll"
    return config
