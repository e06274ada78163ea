"""Gemma 2's cap on products (attention's and the head's); apart from the layers, since losses need no Flax."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_cap(x: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """Returns cap tanh(x / cap), which lies between -cap and cap; x itself where `cap` is 0."""
    return cap * jnp.tanh(x / cap) if cap else x
