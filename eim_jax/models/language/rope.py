"""Rotary position embedding, and the ways in which checkpoints stretch it over longer texts."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies differ from theta^(-2 i / head width), in the words of transformers' `rope_parameters`.

    Attributes:
      kind: "linear" divides all by `factor`; "llama3" (Llama 3.1) divides those that turn less than `low` times within
        `original` tokens, leaves those that turn more than `high` times, and goes from one to the other between.
      factor: by what frequencies are divided.
      low, high: turns within `original` tokens; of "llama3" alone.
      original: the context that the model was pretrained on; of "llama3" alone.
    """

    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self):  # noqa: D105
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_type {self.kind!r} is not supported, only 'default', 'linear' and 'llama3'")
        if not self.factor >= 1:
            raise ValueError(f"the factor of rope_type {self.kind!r} is {self.factor}, not a number from 1 on")
        if self.kind == "llama3" and not 0 < self.low < self.high:
            raise ValueError(
                f"low_freq_factor {self.low} and high_freq_factor {self.high} of rope_type 'llama3': the first is to "
                "be positive and below the second"
            )

    def scaled(self, frequency: np.ndarray) -> np.ndarray:
        """Returns the frequencies in use, in radians a token."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.original * frequency / (2 * np.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency

    def as_theirs(self) -> dict[str, Any]:
        """Returns the fields of transformers' `rope_parameters`, without theta."""
        found = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "llama3":
            found |= {"low_freq_factor": self.low, "high_freq_factor": self.high}
            found |= {"original_max_position_embeddings": self.original}
        return found


def rotation(
    positions: Int[Array, "b t"], head_width: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """Returns RoPE's cos and sin [b t 1 e/2], float32, for each position."""
    if scaling is None:
        frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    else:
        exact = theta ** (-np.arange(0, head_width, 2) / head_width)
        frequency = jnp.asarray(scaling.scaled(exact), jnp.float32)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x: Float[Array, "b t h e"], turn: tuple[Array, Array]) -> Float[Array, "b t h e"]:
    """Turns the pairs (x_i, x_{i+e/2}), as Hugging Face's files order them (Meta's pairs are adjacent)."""
    cos, sin = turn
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
