"""LaVIN-7B-lite with EIM as a chatbot: Alpaca-52k and LLaVA-158k, scored on MME (the paper's Tables 12 and 13).

LLaVA's conversations become single turns (--config.data.multi_turn=True keeps what came before); Alpaca has some rows
with an empty output, which are left out and counted (on_bad). 10 epochs a stage, warm-up 0.2 epoch, base rate 9e-3 for
256, temperature 5, the LLM in 4 bits. The images are COCO's train2014. Without config.data.mme nothing is scored.

`baseline` is LaVIN's own chatbot recipe: --config.arms="('baseline','eim')" compares them.
"""

import ml_collections

from eim_jax.configs import lavin7b_eim_scienceqa


def get_config() -> ml_collections.ConfigDict:
    config = lavin7b_eim_scienceqa.get_config()
    config.towers.quant = "nf4"
    config.data.kind = "instruct"
    config.data.folder = ""
    folder = "data/llava"
    llava = ("conversation_58k.json", "detail_23k.json", "complex_reasoning_77k.json")
    config.data.sources = ("data/alpaca_data.json", *(f"{folder}/{name}" for name in llava))
    config.data.images = "data/coco/train2014"
    config.data.on_bad = "drop"
    config.data.template = "lavin"
    config.data.mme = "data/mme"
    config.decode.max_tokens = 20
    for name in config.stages:
        config.stages[name].epochs = 10
        config.stages[name].warmup_epochs = 0.2
    for name in config.arm:
        config.arm[name].adapter_temperature = 5.0
    return config
