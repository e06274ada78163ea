"""Your own questions about your own pictures, answered by a small instruct model with LoRA and scored while it trains.

python -m eim_jax.main --config=configs/vqa.py --workdir=runs/vqa \
    --config.data.sources="('questions.jsonl',)" --config.data.images=pictures/

A line of the file: {"image": "kitchen.jpg", "question": "What stands on the stove?", "answer": "a red pot"}. Of the
pictures 10 % are held out with all of their questions, scored four times while the last stage trains and at its end,
and the best step is kept. CLIP ViT-B/32 and SmolLM2-135M-Instruct, asked in its own chat template, are downloaded once.

`baseline` trains the connector alone, then connector and low-rank terms; `eim` puts loss_ST before and loss_IE beside.
Other language models: --config.towers.lm=Qwen/Qwen2.5-0.5B-Instruct. Ten people's answers to each question, as VQAv2
has them: --config.data.eval_task=vqa --config.checkpoint.metric=eval/vqa_accuracy
"""

import dataclasses

import ml_collections

from eim_jax.config import Arm, Checkpoint, Config, Data, Decode, Eval, LossWeights, Stage, Towers
from eim_jax.training.kinds import to_config_dict

ST, LOW_RANK = "st/.*", "lm/.*/lora/.*"
RECIPE = {"batch": 32, "warmup_epochs": 0.05, "schedule": "cosine", "eps": 1e-8, "clip_norm": 1.0}
BASELINE = Arm(
    description="CLIP tokens -> MLP -> LM with LoRA, the projector first, trained on loss_base",
    st="ffn",
    st_hidden=576,
    st_bias="uniform",
    lora=("lm/blocks.*",),  # all linear layers of all blocks
    lora_rank=16,
    lora_alpha=32.0,
    sequence=("align", "tune"),
)
EIM = dataclasses.replace(BASELINE, description="EIM on it: stages ST -> IE", sequence=("st", "ie"))


def get_config() -> ml_collections.ConfigDict:
    align = {**RECIPE, "epochs": 1, "lr": 1e-3}
    tune = {**RECIPE, "epochs": 3, "lr": 2e-4}
    both = ((ST, 0.5), LOW_RANK)
    config = Config(
        towers=Towers(clip="openai/clip-vit-base-patch32", lm="HuggingFaceTB/SmolLM2-135M-Instruct", dropout=0.0),
        data=Data(
            kind="instruct",
            sources=("questions.jsonl",),
            images="pictures",
            template="tokenizer",
            max_tokens=128,
            buckets=4,
            eval_share=0.1,
        ),
        arms=("baseline", "eim"),
        arm={"baseline": BASELINE, "eim": EIM},
        stages={
            "align": Stage(train=(ST,), losses=LossWeights(base=1.0), **align),
            "tune": Stage(train=both, losses=LossWeights(base=1.0), **tune),
            "st": Stage(train=(ST,), losses=LossWeights(st=1.0), **align),
            "ie": Stage(train=both, losses=LossWeights(base=1.0, ie=1.0), **tune),
        },
        decode=Decode(methods=("greedy",), max_tokens=16, batch=32),
        eval=Eval(every_epochs=0.75, train=100),
        checkpoint=Checkpoint(every_steps=200, keep="best", metric="eval/exact_match"),
    )
    return to_config_dict(config)
