"""Your own photos and captions with a small instruct model: CLIP, an MLP, SmolLM2-135M-Instruct with LoRA.

python -m eim_jax.main --config=configs/photos_smollm2.py --workdir=runs/photos \
    --config.data.annotations=captions.json --config.data.images=photos/

The language model keeps its own weights; connector and low-rank terms are trained, so that a few hundred photos do
not undo what it knows. A tenth of the photos is held out and scored while the last stage trains; the best step is
kept. With a few dozen photos train the connector alone:
--config.arm.eim.lora="()" --config.stages.ie.train="('st/.*',)"
"""

import ml_collections

from eim_jax.config import Arm, Checkpoint, Config, Data, Eval, LossWeights, Stage, Towers
from eim_jax.training.kinds import to_config_dict

ST, LOW_RANK = "st/.*", "lm/.*/lora/.*"


def get_config() -> ml_collections.ConfigDict:
    recipe = {"batch": 40, "lr": 5e-4, "warmup_steps": 20, "eps": 1e-8}
    eim = Arm(
        description="EIM: CLIP tokens -> MLP -> SmolLM2 with LoRA, trained in stages ST -> IE",
        st="ffn",
        st_hidden=576,
        st_bias="uniform",
        lora=("lm/blocks.*",),
        lora_rank=8,
        sequence=("st", "ie"),
    )
    config = Config(
        towers=Towers(clip="openai/clip-vit-base-patch32", lm="HuggingFaceTB/SmolLM2-135M-Instruct", dropout=0.0),
        data=Data(annotations="captions.json", images="photos", eval_share=0.1),
        arms=("eim",),
        arm={"eim": eim},
        stages={
            "st": Stage(train=(ST,), losses=LossWeights(st=1.0), epochs=60, **recipe),
            "ie": Stage(train=(ST, LOW_RANK), losses=LossWeights(base=1.0, ie=1.0), epochs=20, **recipe),
        },
        eval=Eval(every_epochs=2.0, method="none"),
        log_every=20,
        checkpoint=Checkpoint(every_steps=200, keep="best", metric="eval/nll"),
    )
    return to_config_dict(config)
