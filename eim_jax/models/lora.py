"""Low-rank terms beside the linear layers of a tower: LoRA (Hu et al. 2021) and rsLoRA (Kalajdzievski 2023).

y = x W + bias + scale (drop(x) A) B with A [in rank] and B [rank out]. B starts at zero, so an untrained tower is the
tower itself. The leaves stand beside the kernel, "lm/blocks_0/attn/q/lora/a" and ".../lora/b".

The towers know nothing of it: while one is applied, each linear layer that has these leaves adds its term (a method
interceptor of flax). So every tower that is built of nn.Dense, nn.DenseGeneral or QDense can have it, in 4 bits too,
unrolled or scanned, in training and in decoding. Own code because qwix 0.1.8 finds products by tracing and can see
neither through linear.py's custom gradient nor into the 4-bit layer.
"""

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from eim_jax.models.linear import linear
from eim_jax.models.quant import QDense

A, B = "lora/a", "lora/b"  # what stands behind a layer's path


@dataclass(frozen=True)
class LoRA:
    """The settings of all low-rank terms of an arm.

    Attributes:
      rank: columns of A, rows of B.
      alpha: the terms' factor is alpha / rank.
      dropout: rate on the terms' input, in training.
      rs: rsLoRA: the factor is alpha / sqrt(rank).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rs: bool = False

    @property
    def scale(self) -> float:
        """The terms' factor."""
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)


@dataclass(frozen=True)
class Layer:
    """A linear layer that has a term.

    Attributes:
      path: below the tower: "blocks_0/attn/q".
      inputs: width of its input.
      outputs: of its output: (out,), or (3, out) for query, key and value maps in one kernel.
      stacked: number of layers in a scanned stack, whose leaves have a leading axis; 0 for a single layer.
      apart: each of the three maps has an A of its own, as its file has three layers (CLIP's, not GPT-2's).
    """

    path: str
    inputs: int
    outputs: tuple[int, ...]
    stacked: int = 0
    apart: bool = False

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of its leaves: a [in r], b [r out]; fused: b [r 3 out]; apart: a [in 3 r], b [3 r out]."""
        a, b = (self.inputs, rank), (rank, *self.outputs)
        if self.apart:
            a, b = (self.inputs, self.outputs[0], rank), (self.outputs[0], rank, self.outputs[1])
        lead = (self.stacked,) if self.stacked else ()
        return {f"{self.path}/{A}": (*lead, *a), f"{self.path}/{B}": (*lead, *b)}


@dataclass(frozen=True)
class Tuned:
    """A tower with low-rank terms: it is applied as the module inside, to a tree that may hold their leaves.

    Without leaves it is the module. All but `apply` is the module's own (`init` draws no leaves, `draw` does).
    """

    module: nn.Module
    lora: LoRA
    layers: tuple[Layer, ...]

    def apply(self, variables: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """Returns what the module's method does, each layer's term added."""
        with nn.intercept_methods(functools.partial(_add_term, self.lora)):
            return self.module.apply(variables, *arguments, **options)

    def clone(self, **changes: Any) -> "Tuned":
        """Returns the same terms in a module with other fields."""
        return replace(self, module=self.module.clone(**changes))

    def __getattr__(self, name: str) -> Any:
        """Gives the module's own attributes; a dataclass's own fields never come here."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module, name)

    def draw(self, key: Array) -> dict[str, Array]:
        """Returns fresh leaves by path: A uniform within +-1/sqrt(in), as PEFT's; B zero.

        A layer's draw depends on its path and the key alone: another pattern leaves the others' as they are.
        """
        leaves = {}
        for layer in self.layers:
            bound = layer.inputs**-0.5
            for path, shape in layer.shapes(self.lora.rank).items():
                own = jax.random.fold_in(key, zlib.crc32(path.encode()))
                leaves[path] = jnp.zeros(shape)
                if path.endswith(A):
                    leaves[path] = jax.random.uniform(own, shape, minval=-bound, maxval=bound)
        return leaves

    def merge(self, params: Mapping[str, Any], sign: int = 1) -> dict[str, Any]:
        """Returns the tower's tree with the terms inside the kernels, and no leaves of their own.

        Args:
          params: the tree, the terms' leaves included.
          sign: -1 takes them out again, of kernels that hold them; then the leaves stay.

        Raises:
          ValueError: a kernel is held in 4 bits, into which nothing can be added.
        """
        flat: dict[str, Any] = {**flatten_dict(dict(params), sep="/")}
        for layer in self.layers:
            kernel = flat.get(f"{layer.path}/kernel")
            if kernel is None:
                raise ValueError(
                    f"{layer.path} is held in 4 bits, into which no term can be merged: load the whole weights "
                    "(config.towers.quant='none')"
                )
            a, b = (jnp.asarray(flat[f"{layer.path}/{name}"], jnp.float32) for name in (A, B))
            product = jax.vmap(_product) if layer.stacked else _product
            term = sign * self.lora.scale * product(a, b)
            flat[f"{layer.path}/kernel"] = (jnp.asarray(kernel, jnp.float32) + term).astype(kernel.dtype)
        if sign > 0:
            added = {f"{layer.path}/{name}" for layer in self.layers for name in (A, B)}
            flat = {path: leaf for path, leaf in flat.items() if path not in added}
        return unflatten_dict(flat, sep="/")


def plain(tower: Any) -> nn.Module:
    """Returns a tower without its low-rank terms."""
    return tower.module if isinstance(tower, Tuned) else tower


def dropout_of(tower: Any) -> float:
    """Returns the dropout rate of a tower's low-rank terms, 0 where it has none."""
    return tower.lora.dropout if isinstance(tower, Tuned) else 0.0


@functools.cache
def linear_layers(tower: nn.Module, *shape: int, dtype: str = "float32") -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns the linear layers that a tower's own forward calls: path -> (width of the input, shape of the output).

    Layers whose kernel is read in another way (a language model's head, a convolution) are none of them.

    Args:
      tower: the module.
      *shape: of what its `init` takes.
      dtype: of that.
    """
    found = {}

    def watch(call, arguments, options, context):
        made = call(*arguments, **options)
        if _is_linear(context):
            x = arguments[0]
            found["/".join(context.module.path)] = (x.shape[-1], made.shape[x.ndim - 1 :])
        return made

    with nn.intercept_methods(watch):
        jax.eval_shape(tower.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))
    return found


def _is_linear(context: nn.module.InterceptorContext) -> bool:
    """Whether a call is a linear layer's, over the last axis of its input."""
    module = context.module
    general = isinstance(module, nn.DenseGeneral) and module.axis == -1
    return context.method_name == "__call__" and (general or isinstance(module, nn.Dense | QDense))


def _add_term(lora: LoRA, call, arguments, options, context):
    """A method's result; a linear layer's with its term, where it has leaves."""
    y = call(*arguments, **options)
    if not _is_linear(context) or not context.module.has_variable("params", "lora"):
        return y
    module, x = context.module, arguments[0].astype(y.dtype)
    leaves = module.get_variable("params", "lora")
    a, b = leaves["a"].astype(y.dtype), leaves["b"].astype(y.dtype)
    if lora.dropout and module.has_rng("dropout"):  # given in training alone
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - lora.dropout, x.shape)
        x = jnp.where(keep, x / (1 - lora.dropout), 0).astype(y.dtype)
    low = linear(x, a)
    term = jnp.einsum("...kr,kro->...ko", low, b) if a.ndim == 3 else linear(low, b)
    return y + jnp.asarray(lora.scale, y.dtype) * term


def _product(a: Float[Array, "d *_"], b: Float[Array, "*_ o"]) -> Float[Array, "d *_"]:
    """A B in a kernel's shape."""
    if a.ndim == 3:
        return jnp.einsum("dkr,kro->dko", a, b, precision="highest")
    return jnp.tensordot(a, b, 1, precision="highest")
