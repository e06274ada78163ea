"""One vector of a row's tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def mean_tokens(values: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b d"]:
    """Returns the mean over the marked tokens, in float32."""
    mask = mask[..., None].astype(jnp.float32)
    return (values.astype(jnp.float32) * mask).sum(1) / jnp.maximum(mask.sum(1), 1.0)


def last_token(values: Float[Array, "b t d"], valid: Bool[Array, "b t"]) -> Float[Array, "b d"]:
    """Returns the vector at each row's last valid token (the appended EOS)."""
    t = values.shape[1]
    last = jnp.max(jnp.where(valid, jnp.arange(t)[None], 0), axis=1)
    return jax.vmap(lambda row, i: row[i])(values, last)
