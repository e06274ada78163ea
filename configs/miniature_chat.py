"""The LaVIN chatbot in miniature: instructions over drawn scenes, scored by yes/no questions in MME's form."""

import ml_collections

from eim_jax.configs import miniature_lavin


def get_config() -> ml_collections.ConfigDict:
    config = miniature_lavin.get_config()
    config.data.kind = "miniature_chat"
    config.data.max_tokens = 96
    config.decode.max_tokens = 8  # a yes or a no
    return config
