"""Bounds on float32 results, relative to what was added up: an absolute bound holds on one CPU and not on the next.

CPUs (and XLA's choice of instructions, --xla_cpu_max_isa) add up in different orders. Two orders of a float32 sum of n
terms differ by about sqrt(n) eps sum|terms|, with eps = 1.2e-7. How large the terms are shows in the largest element of
the result: an element near zero is a sum whose terms cancel, so its error is as large as that of its neighbours.
`off` counts in units of that size; 1e-5 is 84 eps: a few layers of sums of some tens to thousands of terms.
"""

import os

import jax
import numpy as np
import pytest

NEEDS_FLOAT16 = pytest.mark.skipif(
    "xla_cpu_max_isa=SSE4_2" in os.environ.get("XLA_FLAGS", ""), reason="XLA compiles no float16 for SSE4.2"
)


def size_of(*arrays) -> float:
    """The largest magnitude in the arrays."""
    return max(float(np.abs(np.asarray(x, np.float64)).max(initial=0)) for x in arrays)


def assert_close(found, expected, off=1e-5, *, size=None, rtol=0.0, err_msg=""):
    """Asserts |found - expected| <= off * size + rtol * |expected|, element by element.

    Args:
        found: What is tested.
        expected: What it should be, of the same shape or broadcast to it.
        off: The error allowed, as a fraction of `size`.
        size: The magnitude of what was added up, by default the largest |expected|. To be given where every element is
            a difference of larger numbers, such as log-probabilities (a logit less the logsumexp of all).
        rtol: What an element may be off by in proportion to itself, beyond that.
        err_msg: Said with a failure.
    """
    size = size_of(expected) if size is None else size
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=off * size, err_msg=err_msg)


def assert_trees_close(found, expected, off=1e-5, *, rtol=0.0):
    """assert_close of every leaf, for gradients and parameters.

    A leaf's size is its own largest element, but at least a tenth of the largest in the tree: some gradients are zero
    whatever the input (softmax ignores a bias of all keys), and what they are off by comes from terms that cancel.
    """
    least = size_of(*jax.tree.leaves(expected)) / 10
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path)
        assert_close(other, one, off, size=max(size_of(one), least), rtol=rtol, err_msg=name)


def assert_most_probable(tokens, logits, off=2e-5):
    """Asserts that greedy decoding chose these tokens, by logits of another forward pass over them.

    Of two tokens that rounding cannot tell apart either may be chosen, so a token's logit may be below the largest of
    its position by `off` of the largest |logit|: each of the two forwards is off by what assert_close allows.
    """
    logits = np.asarray(logits)
    chosen = np.take_along_axis(logits, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    short = logits.max(-1) - chosen
    assert (short <= off * size_of(logits)).all(), f"less probable by {short} at {np.argwhere(short > 0).tolist()}"
