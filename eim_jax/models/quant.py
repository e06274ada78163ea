"""Frozen linear layers that hold their kernel in 4 bits (towers.quant="nf4"), and the conversion to and from it.

The form is QLoRA's (Dettmers et al. 2023, section 3): NF4 codes in blocks of 64 weights, doubly quantised scales.
w = table[code] s: the table is NF4's (appendix E), s one number a block of 64 weights along `in`. Double quantisation
stores s as int8, s = mean + int8 r, with one float32 r for 256 neighbouring outputs and one mean a kernel:
4 + 8/64 + 32/(64 256) = 4.127 bits a weight. Own code because the public API of qwix 0.1.8, which has the same table,
has no double quantisation (float32 scales, 4.5 bits) and holds a code in a byte on CPU (jnp.uint4).
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eim_jax.models.linear import PRODUCT, linear

QUANTS = ("none", "nf4")
BLOCK = 64  # weights along `in` that share a scale
GROUP = 256  # scales along `out` that share a scale
NF4_SCALES = ("scale_scale", "scale_mean")  # the leaves that stay float32 whatever the compute dtype

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_MIDPOINTS = (NF4[1:] + NF4[:-1]) / 2
_CHUNK = 1 << 20  # weights that NumPy quantises at a time: bounded memory, and near the cache

Quantised = Mapping[str, Array | np.ndarray]
Places = tuple[tuple[str, NamedSharding], ...]  # of leaves, by their name


def quantised_shapes(features_in: int, features: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what quantise makes of a kernel [in out], without making it.

    Raises:
      ValueError: `in` is not a multiple of the block.
    """
    if features_in % BLOCK:
        raise ValueError(f"NF4 needs features_in (in) to be a multiple of {BLOCK}, not {features_in}")
    blocks = features_in // BLOCK
    return {
        "codes": jax.ShapeDtypeStruct((features_in // 2, features), jnp.uint8),
        "scale": jax.ShapeDtypeStruct((blocks, features), jnp.int8),
        "scale_scale": jax.ShapeDtypeStruct((blocks, -(-features // GROUP)), jnp.float32),
        "scale_mean": jax.ShapeDtypeStruct((), jnp.float32),
    }


def quantise(kernel: Float[Array | np.ndarray, "a c"]) -> Quantised:
    """Returns a kernel [in out] as NF4: nearest codes to w / max|w of its block|, doubly quantised scales.

    Args:
      kernel: of any float type. A NumPy array is quantised by NumPy, a few blocks at a time; a JAX array by JAX, also
        under jit and vmap (a stack of layers).

    Returns:
      codes uint8 [in/2 out], byte i holding row 2i in its low and row 2i + 1 in its high four bits; scale int8
      [in/64 out]; scale_scale float32 [in/64 ceil(out/256)]; scale_mean float32 []. NumPy for NumPy.

    Raises:
      ValueError: `in` is not a multiple of 64, or a NumPy kernel holds NaN or infinity.
    """
    shapes = quantised_shapes(*kernel.shape)
    if not isinstance(kernel, np.ndarray):
        codes, absmax = _quantise_blocks(kernel, jnp)
        return {"codes": codes, **_quantise_scales(absmax, jnp)}
    codes, absmax = (np.empty(shapes[n].shape, d) for n, d in (("codes", np.uint8), ("scale", np.float32)))
    step = max(1, _CHUNK // (BLOCK * kernel.shape[1]))  # blocks
    for i in range(0, len(absmax), step):
        with np.errstate(invalid="ignore"):  # NaN and infinity reach absmax, and are refused below
            part = _quantise_blocks(kernel[i * BLOCK : (i + step) * BLOCK], np)
        codes[i * BLOCK // 2 : (i + step) * BLOCK // 2], absmax[i : i + step] = part
    if not np.isfinite(absmax).all():
        raise ValueError("the kernel to quantise holds NaN or infinity; check the file it came from")
    return {"codes": codes, **_quantise_scales(absmax, np)}


def _quantise_blocks(kernel, xp):
    """Returns packed codes [in/2 out] and each block's largest magnitude [in/64 out]."""
    blocks = kernel.astype(np.float32).reshape(-1, BLOCK, kernel.shape[1])
    absmax = xp.maximum(blocks.max(1), -blocks.min(1))
    ratio = blocks / xp.where(absmax == 0, 1, absmax)[:, None]
    codes = (ratio > _MIDPOINTS[0]).astype(np.uint8)  # ten times as fast as searchsorted
    for midpoint in _MIDPOINTS[1:]:
        codes += ratio > midpoint
    codes = codes.reshape(-1, 2, kernel.shape[1])
    return codes[:, 0] | codes[:, 1] << 4, absmax


def _quantise_scales(absmax, xp):
    """Returns int8 scales [in/64 out], their scales [in/64 out/256] and their mean []."""
    mean = absmax.mean()
    centred = absmax - mean
    groups = -(-absmax.shape[1] // GROUP)
    padded = xp.pad(centred, ((0, 0), (0, groups * GROUP - absmax.shape[1])))
    scale_scale = abs(padded).reshape(-1, groups, GROUP).max(2) / 127
    step = _per_output(xp.where(scale_scale == 0, 1, scale_scale), absmax.shape[1], xp)
    return {
        "scale": xp.round(centred / step).astype(np.int8),
        "scale_scale": scale_scale,
        "scale_mean": xp.asarray(mean),
    }


def _per_output(scale_scale, features: int, xp):
    return xp.repeat(scale_scale, GROUP, axis=1)[:, :features]


def dequantise(leaves: Quantised, dtype: DTypeLike = jnp.float32) -> Float[Array, "a c"]:
    """Returns the kernel [in out] that quantise's result stands for, computed in float32 and rounded to `dtype`."""
    codes, features = jnp.asarray(leaves["codes"]), leaves["codes"].shape[1]
    codes = jnp.stack([codes & 15, codes >> 4], axis=1).reshape(-1, features)
    step = _per_output(jnp.asarray(leaves["scale_scale"]), features, jnp)
    scale = leaves["scale_mean"] + leaves["scale"].astype(jnp.float32) * step
    return (jnp.asarray(NF4)[codes] * jnp.repeat(scale, BLOCK, axis=0)).astype(dtype)


class QDense(nn.Module):
    """A linear layer, its kernel plain (quant "none") or frozen in 4 bits (quant "nf4").

    Parameters: kernel [in out], or quantise's four leaves by their names; bias [out]. In 4 bits the gradient goes to x
    alone, and the backward pass makes the kernel anew from its codes: between the passes neither it nor x is held. Both
    kinds draw the same kernel from the same key.

    Raises:
      ValueError: an unknown `quant`, or 4 bits with `features_in` not a multiple of 64.
    """

    features_in: int
    features: int
    quant: str = "none"
    use_bias: bool = False
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32

    def setup(self):  # noqa: D102
        if self.quant not in QUANTS:
            raise ValueError(f"quant {self.quant!r} is not one of {QUANTS}")
        shape = (self.features_in, self.features)
        if self.quant == "none":
            self.kernel = self.param("kernel", self.kernel_init, shape)
        else:
            leaves = quantised_shapes(*shape)
            if self.is_initializing():  # only then: apply would trace the initialiser too, to compare shapes
                leaves = quantise(self.kernel_init(self.make_rng("params"), shape))
                made = {name: (lambda _, leaf=leaf: leaf) for name, leaf in leaves.items()}
            else:
                made = {name: (lambda _, leaf=leaf: jnp.zeros(leaf.shape, leaf.dtype)) for name, leaf in leaves.items()}
            self.leaves = {name: self.param(name, make) for name, make in made.items()}
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

    def __call__(self, x: Float[Array, "*b {self.features_in}"]) -> Float[Array, "*b {self.features}"]:
        """Returns x W (+ bias) in `dtype`."""
        x = x.astype(self.dtype)
        y = linear(x, self.kernel.astype(self.dtype)) if self.quant == "none" else self.packed_product(x)
        return y + jnp.broadcast_to(self.bias.astype(self.dtype), y.shape) if self.use_bias else y

    def packed_product(self, x: Float[Array, "*b {self.features_in}"], places: Places = ()) -> Array:
        """Returns x W from the four leaves, each of which lies on its `places` while it is read."""
        return checkpoint_name(product(x, self.leaves, places), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*b a"], leaves: Quantised, places: Places = ()) -> Float[Array, "*b c"]:
    """Returns x times the kernel that the leaves stand for, in x's dtype; the leaves get no gradient.

    Args:
      x: of any float type.
      leaves: as `quantise` returns them.
      places: (name, sharding) of leaves, to which they are brought first: so devices that hold parts of a kernel send
        each other its codes, a quarter of bfloat16's bytes. Left to itself XLA sends what it has made of the codes.
    """
    # Tied to x by the barrier, no kernel can be hoisted out of a loop over x: decoding would hold every layer's.
    x, leaves = jax.lax.optimization_barrier((x, leaves))
    return linear(x, dequantise(_put(leaves, places), x.dtype))


def _put(leaves, places):
    return {**leaves, **{name: jax.lax.with_sharding_constraint(leaves[name], where) for name, where in places}}


def _product_forward(x, leaves, places):
    return product(x, leaves, places), leaves


def _product_backward(places, leaves, dy):
    dy, leaves = jax.lax.optimization_barrier((dy, leaves))
    return linear(dy, dequantise(_put(leaves, places), dy.dtype).T), None


product.defvjp(_product_forward, _product_backward)
