"""Every field of a run with its default and meaning: see the dataclasses of eim_jax/config/fields.py."""

import ml_collections

from eim_jax.config import Config
from eim_jax.training.kinds import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    return to_config_dict(Config())
