"""Arithmetic of a traced program, counted from shapes: matrix products, with scanned bodies as often as they run.

XLA's own count (`cost_analysis`) takes the body of a loop once, and knows nothing of what a TPU topology would do.
"""

import math
from typing import NamedTuple

from jax.extend import core

# Products [t e] x [e s] that cuDNN's flash attention computes a head: backward the scores again, and four gradients.
CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


class Work(NamedTuple):
    """Of all devices together. `bytes`: operands and results of the products, each read or written once.

    `unknown`: loops whose number of turns is not in the program; their body is counted once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    unknown: int = 0

    def times(self, number: int) -> "Work":
        """The work of `number` runs."""
        return Work(self.flops * number, self.bytes * number, self.unknown)


def work(jaxpr) -> Work:
    """Counts a (closed) jaxpr, everything inside included; elementwise operations are left out."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    parts = [_equation(equation) for equation in jaxpr.eqns]
    return Work(*(sum(column) for column in zip(*parts, strict=True))) if parts else Work()


def _equation(equation) -> Work:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, right = (v.aval for v in equation.invars)
        out = equation.outvars[0].aval
        depth = math.prod(left.shape[i] for i in contracted)
        moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in (left, right, out))
        return Work(2.0 * math.prod(out.shape) * depth, float(moved))
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval, equation.outvars[0].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return Work(2.0 * math.prod(out.shape) * math.prod(kernel.shape) / features)
    if name in CUDNN:  # queries [b t h e], keys [b s kv e], ...
        queries, keys = (v.aval.shape for v in equation.invars[:2])
        arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
        moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        return Work(CUDNN[name] * 2.0 * math.prod(queries) * keys[1], float(moved))
    if name == "scan":
        return work(params["jaxpr"]).times(params["length"])
    if name == "while":
        body = work(params["body_jaxpr"])
        return body._replace(unknown=body.unknown + (body.flops > 0))
    if name == "cond":
        return max((work(branch) for branch in params["branches"]), key=lambda w: w.flops)
    if name == "shard_map":  # the body is one device's
        mesh = params["mesh"]
        return work(params["jaxpr"]).times(math.prod(mesh.shape.values()))
    if name == "pallas_call":
        return work(params["jaxpr"]).times(math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int)))
    inner = [work(x) for x in _jaxprs(params.values())]
    return Work(*(sum(column) for column in zip(*inner, strict=True))) if inner else Work()


def _jaxprs(values):
    for value in values:
        if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _jaxprs(value)
