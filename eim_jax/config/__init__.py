"""Every field of a run with its default, checks, and the way to and from ml_collections' ConfigDict."""

from eim_jax.config.checks import ConfigError, patterns
from eim_jax.config.conversion import as_dict, explain_unknown, flatten, from_config_dict
from eim_jax.config.fields import Arm, Checkpoint, Config, Data, Decode, Eval, Losses, LossWeights, Stage, Towers
from eim_jax.config.resume import deciding, read_saved, recorded_seam

__all__ = [
    "Arm", "Checkpoint", "Config", "ConfigError", "Data", "Decode", "Eval", "LossWeights", "Losses", "Stage", "Towers",
    "as_dict", "deciding", "explain_unknown", "flatten", "from_config_dict", "patterns", "read_saved",
    "recorded_seam",
]  # fmt: skip
