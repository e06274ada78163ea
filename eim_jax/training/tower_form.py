"""In which form a run's towers are computed on a platform: attention, scan, recomputation, dtype."""

import jax.numpy as jnp

from eim_jax.config import Config, ConfigError
from eim_jax.models.stacks import Form


def resolve_form(config: Config, dtype: jnp.dtype, platform: str) -> Form:
    """Returns how the towers are computed, by config.towers, in this dtype on this platform.

    Raises:
      ConfigError: an attention that the platform does not have.
    """
    towers = config.towers
    attention = resolve_attention(towers.attention, dtype, platform)
    return {"scan": towers.scan, "remat": towers.remat, "attention": attention, "dtype": dtype}


def resolve_attention(name: str, dtype: jnp.dtype, platform: str) -> str:
    """auto: ours. cudnn is refused where it does not exist; it is chosen by name, as no odd length compiles there.

    Raises ConfigError for cudnn on another platform than a GPU, or in float32.
    """
    if name == "cudnn" and (platform not in ("gpu", "cuda") or dtype != jnp.bfloat16):
        raise ConfigError(
            f"config.towers.attention='cudnn' is for NVIDIA GPUs in bfloat16, this is {platform} in {dtype.name}: "
            "set it to 'auto', or config.towers.dtype='bfloat16' on a GPU"
        )
    return "softmax" if name == "auto" else name


def resolve_dtype(name: str, platform: str) -> jnp.dtype:
    """auto: float32 on CPU (XLA has no fast bfloat16 there), bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)
