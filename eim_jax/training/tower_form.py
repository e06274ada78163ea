"""In which form a run's towers are computed on a platform: attention, scan, recomputation, dtype."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from eim_jax.config import Config, ConfigError
from eim_jax.models.attention import LONG
from eim_jax.models.stacks import Form
from eim_jax.parallel.sharding import parts_of
from eim_jax.utils.cpu import BF16_UNITS

# The narrowest LM for which the log names bfloat16 on a CPU: a step of GPT-2 small, of width 768, gains by it
# (docs/performance), one of the miniature's, of width 128, does not.
_WIDE = 512


def resolve_form(config: Config, dtype: jnp.dtype, platform: str) -> Form:
    """Returns how the towers are computed, by config.towers, in this dtype on this platform.

    Raises:
      ConfigError: an attention that the platform does not have.
    """
    towers = config.towers
    attention = resolve_attention(towers.attention, dtype, platform)
    return {"scan": towers.scan, "remat": towers.remat, "attention": attention, "dtype": dtype}


def resolve_attention(name: str, dtype: jnp.dtype, platform: str) -> str:
    """Returns what the towers are built with, a name in models/attention.ATTENTIONS.

    auto is cuDNN's flash attention for long rows in bfloat16 on an NVIDIA GPU, and ours everywhere else.

    Raises ConfigError for cudnn on another platform (parallel/chips.platform_of), or in float32.
    """
    flash = platform == "cuda" and dtype == jnp.bfloat16
    if name == "cudnn" and not flash:
        raise ConfigError(
            f"config.towers.attention='cudnn' is for NVIDIA GPUs (A100 and later) in bfloat16, this is {platform} in "
            f"{dtype.name}: set it to 'auto', or config.towers.dtype='bfloat16' on such a GPU"
        )
    return name if name != "auto" else "cudnn_long" if flash else "softmax"


def attention_on_mesh(shape: Any, mesh: Mesh) -> Any:
    """Returns a tower's shape (or None) with the attention that the mesh leaves it.

    cuDNN's kernel takes whole heads: where "tensor" does not divide them, heads are split inside and ours computes.
    """
    if shape is None or not shape.attention.startswith("cudnn"):
        return shape
    heads = getattr(shape, "kv_heads", getattr(shape, "heads", 0))
    return replace(shape, attention="softmax") if heads % parts_of(mesh, ("tensor",)) else shape


def describe_attention(attention: str) -> str:
    """Says in words what resolve_attention chose; "" for ours, which needs none."""
    where = {
        "cudnn_long": f"where queries and keys are {LONG} or more",
        "cudnn": "wherever it takes the shape",
    }
    if attention in where:
        return f"attention: cuDNN's flash kernel {where[attention]}, else float32 softmax"
    return "attention: jax.nn.dot_product_attention" if attention == "xla" else ""


def faster_dtype(dtype: jnp.dtype, platform: str, units: Collection[str], width: int) -> str:
    """Says that a CPU with these units multiplies bfloat16 faster than a run's float32; "" where it does not.

    >>> faster_dtype(jnp.dtype("float32"), "cpu", ("avx512f", "amx_bf16"), 768).split(":")[0]
    'this CPU has bfloat16 units (amx_bf16)'
    >>> faster_dtype(jnp.dtype("float32"), "cpu", ("avx2", "avx512f"), 768)
    ''
    """
    found = [unit for unit in units if unit in BF16_UNITS]
    if platform != "cpu" or dtype != jnp.float32 or not found or width < _WIDE:
        return ""
    return f"this CPU has bfloat16 units ({', '.join(found)}): --config.towers.dtype=bfloat16 is likely faster on it"


def resolve_dtype(name: str, platform: str) -> jnp.dtype:
    """auto: float32 on CPU (few have units for bfloat16), bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)
