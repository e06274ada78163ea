"""NF4 with double quantisation: against float64 NumPy, the normal distribution's quantiles, and plain dense layers."""

import re
import statistics
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import NEEDS_FLOAT16, assert_close
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eim_jax.models.quant import NF4, QDense, dequantise, product, quantise, quantised_shapes
from eim_jax.parallel.sharding import COLUMN, ROW, make_mesh

LAYERS, WIDTH, MLP, VOCAB = 32, 4096, 11008, 32000  # LLaMA-7B


def held_bytes(features_in: int, features: int) -> int:
    """The bytes of a kernel in 4 bits: codes, int8 scales, one float32 for 256 of them and one for the kernel."""
    scales = features_in // 64
    return features_in * features // 2 + scales * features + 4 * scales * -(-features // 256) + 4


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def oracle(kernel):
    """Codes [in out], exact scales and doubly quantised scales [in/64 out], in float64 from the definitions."""
    blocks = kernel.astype(np.float64).reshape(-1, 64, kernel.shape[1])
    exact = np.abs(blocks).max(1)
    ratio = blocks / np.where(exact == 0, 1, exact)[:, None]
    codes = np.abs(ratio[..., None] - NF4.astype(np.float64)).argmin(-1).reshape(kernel.shape)
    mean, scales = exact.mean(), np.empty_like(exact)
    for row in range(exact.shape[0]):
        for start in range(0, exact.shape[1], 256):
            part = exact[row, start : start + 256] - mean
            step = np.abs(part).max() / 127
            scales[row, start : start + 256] = mean + (np.round(part / step) * step if step else 0)
    return codes, exact, scales


def unpack(codes):
    codes = np.asarray(codes)
    return np.stack([codes % 16, codes // 16], 1).reshape(-1, codes.shape[1])


def numpy(leaves):
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def test_table_is_the_quantiles_of_a_normal_distribution():
    # QLoRA section 3 and its code: 8 quantiles below, 9 above zero (zero in both), the outermost of mass 1 - offset.
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    positive, negative = quantile(np.linspace(offset, 0.5, 9)), -quantile(np.linspace(offset, 0.5, 8))
    table = np.unique(np.round(np.concatenate([positive, negative]), 12)) / positive[0]
    np.testing.assert_allclose(NF4, table, atol=2e-5)


@pytest.mark.parametrize("shape", [(64, 5), (192, 256), (128, 700)])
def test_leaves_are_the_definition_in_float64(shape):
    kernel = gaussian(*shape)
    codes, _, scales = oracle(kernel)
    leaves = quantise(kernel)
    assert {n: (x.shape, x.dtype) for n, x in leaves.items()} == {
        n: (s.shape, s.dtype) for n, s in quantised_shapes(*shape).items()
    }
    np.testing.assert_array_equal(unpack(leaves["codes"]), codes)
    assert_close(dequantise(leaves), NF4[codes] * np.repeat(scales, 64, 0), 1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float16, marks=NEEDS_FLOAT16), jnp.bfloat16])
def test_numpy_in_chunks_jax_and_a_stack_under_vmap_make_the_same_codes(dtype, monkeypatch):
    monkeypatch.setattr("eim_jax.models.quant._CHUNK", 64 * 96 * 3)  # three blocks a chunk of seven
    kernels = gaussian(2, 448, 96).astype(dtype)
    stacked = numpy(jax.jit(jax.vmap(quantise))(kernels))
    for layer, kernel in enumerate(kernels):
        by_numpy, by_jax = quantise(kernel), numpy(quantise(jnp.asarray(kernel)))
        assert all(isinstance(leaf, np.ndarray) for leaf in by_numpy.values())
        for name, leaf in by_numpy.items():
            np.testing.assert_allclose(by_jax[name], leaf, rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(stacked[name][layer], leaf, rtol=1e-6, err_msg=name)


def test_a_transposed_view_as_loaders_give_it_is_quantised_as_its_copy():
    view = gaussian(96, 128).T
    for name, leaf in quantise(np.ascontiguousarray(view)).items():
        np.testing.assert_array_equal(quantise(view)[name], leaf)


def test_quantising_a_dequantised_kernel_gives_its_codes_back():
    leaves = quantise(gaussian(256, 300))
    again = quantise(np.asarray(dequantise(leaves)))
    np.testing.assert_array_equal(again["codes"], leaves["codes"])


def test_error_is_within_half_the_largest_gap_and_the_scales_error():
    kernel = gaussian(512, 600) * np.linspace(0.1, 3, 600, dtype=np.float32)[None]
    _, exact, scales = oracle(kernel)
    leaves = quantise(kernel)
    step = np.repeat(leaves["scale_scale"], 256, 1)[:, :600]
    assert np.all(np.abs(scales - exact) <= step / 2 + 1e-6)  # what double quantisation may cost a scale
    error = np.abs(np.asarray(dequantise(leaves), np.float64) - kernel)
    bound = np.diff(NF4).max() / 2 * exact + np.abs(scales - exact)
    assert np.all(error <= np.repeat(bound, 64, 0) + 1e-6)


def test_double_quantisation_adds_less_than_a_hundredth_of_the_error():
    kernel = gaussian(1024, 1024)
    codes, exact, _ = oracle(kernel)
    single = np.sqrt(np.mean((NF4[codes] * np.repeat(exact, 64, 0) - kernel) ** 2))
    double = np.sqrt(np.mean((np.asarray(dequantise(quantise(kernel)), np.float64) - kernel) ** 2))
    assert 0.08 < single < 0.1  # of the weights' RMS, 1
    assert single < double < 1.01 * single


@pytest.mark.filterwarnings("error")  # 0 / 0
def test_blocks_of_zeros_stay_zero():
    kernel = gaussian(128, 300)
    kernel[64:, 7] = 0
    kernel[:64, :] = 0
    back = np.asarray(dequantise(quantise(kernel)))
    assert not back[:64].any() and not back[64:, 7].any() and back[64:, 8].any()
    assert not np.asarray(dequantise(quantise(np.zeros((64, 3), np.float32)))).any()


def test_bad_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"features_in \(in\) to be a multiple of 64, not 100"):
        quantise(gaussian(100, 8))
    with pytest.raises(ValueError, match="multiple of 64, not 32"):
        QDense(32, 8, quant="nf4").init(jax.random.key(0), jnp.ones((1, 32)))
    with pytest.raises(ValueError, match="'int4' is not one of"):
        QDense(64, 8, quant="int4").init(jax.random.key(0), jnp.ones((1, 64)))
    for bad in (np.nan, np.inf, -np.inf):
        kernel = gaussian(128, 8)
        kernel[70, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantise(kernel)


def test_plain_layer_is_a_dense_layer_with_the_same_parameters():
    x = jnp.asarray(gaussian(2, 3, 64))
    ours, flax = QDense(64, 10, use_bias=True), nn.Dense(10)
    variables = ours.init(jax.random.key(1), x)
    assert jax.tree.structure(variables) == jax.tree.structure(flax.init(jax.random.key(1), x))
    variables = jax.tree.map(lambda a: a + 0.5, variables)
    np.testing.assert_allclose(ours.apply(variables, x), flax.apply(variables, x), rtol=1e-6)


def test_both_kinds_start_from_the_same_kernel():
    x = jnp.ones((1, 128))
    plain = QDense(128, 40).init(jax.random.key(3), x)["params"]["kernel"]
    leaves = QDense(128, 40, quant="nf4").init(jax.random.key(3), x)["params"]
    np.testing.assert_allclose(dequantise(leaves), dequantise(quantise(plain)), rtol=1e-6)


def test_output_and_gradient_to_x_are_those_of_the_dequantised_dense():
    x, weight = gaussian(2, 5, 128), gaussian(2, 5, 300, seed=1)
    layer = QDense(128, 300, quant="nf4", use_bias=True)
    variables = layer.init(jax.random.key(0), jnp.asarray(x))
    variables["params"]["bias"] += 0.3
    kernel = np.asarray(dequantise(variables["params"]), np.float64)
    y = jax.jit(layer.apply)(variables, x)
    assert_close(y, x @ kernel + 0.3, 1e-4, rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer.apply(variables, x) * weight)))(x)
    assert_close(gradient, weight @ kernel.T, 1e-4, rtol=1e-4)


def test_quantised_leaves_get_no_gradient():
    leaves = {n: jnp.asarray(leaf) for n, leaf in quantise(gaussian(64, 8)).items()}
    x = jnp.ones((2, 64))
    gradient = jax.grad(lambda leaves: jnp.sum(product(x, leaves) ** 2), allow_int=True)(leaves)
    assert gradient["codes"].dtype == gradient["scale"].dtype == jax.dtypes.float0
    assert not gradient["scale_scale"].any() and not gradient["scale_mean"].any()


def test_between_the_passes_only_the_leaves_are_held():
    leaves = {n: jnp.asarray(leaf) for n, leaf in quantise(gaussian(256, 512)).items()}
    held = jax.tree.leaves(jax.vjp(lambda x: product(x, leaves), jnp.ones((64, 256)))[1])
    assert sum(leaf.nbytes for leaf in held) <= held_bytes(256, 512)


@pytest.mark.parametrize("backward", [False, True])
def test_a_loop_over_inputs_carries_codes_and_no_kernel(backward):
    layers = [{n: jnp.asarray(x) for n, x in quantise(gaussian(512, 512, seed=i)).items()} for i in range(4)]

    def loop(x, layers, steps):
        def forward(x):
            for leaves in layers:
                x = jnp.tanh(product(x, leaves))
            return x

        function = jax.grad(lambda x: forward(x).sum()) if backward else forward
        return jax.lax.fori_loop(0, steps, lambda _, x: function(x), x)

    text = jax.jit(loop).lower(jnp.ones((1, 512)), layers, 5).compile().as_text()
    (carried,) = re.findall(r"= (\(.*?\)) while\(", text)
    assert carried.count("u8[256,512]") == 4
    assert "f32[512,512]" not in carried


def test_scanned_layers_hold_one_kernel_at_a_time():
    stack = {n: jnp.asarray(x) for n, x in jax.vmap(quantise)(gaussian(8, 512, 512)).items()}

    def forward(x, stack):
        return jax.lax.scan(lambda x, leaves: (jnp.tanh(product(x, leaves)), None), x, stack)[0].sum()

    for function in (forward, jax.grad(forward)):
        compiled = jax.jit(function).lower(jnp.ones((1, 512)), stack).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * 512 * 512 * 4


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_in_bfloat16_are_the_layers_one_by_one(remat):
    class Block(nn.Module):
        def setup(self):
            self.dense = QDense(64, 64, quant="nf4", dtype=jnp.bfloat16)

        def __call__(self, x):
            return jnp.tanh(self.dense(x)), None

    block = nn.remat(Block, prevent_cse=False) if remat else Block
    stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jnp.asarray(gaussian(2, 4, 64), jnp.bfloat16)
    variables = jax.jit(stack.init)(jax.random.key(0), x)
    leaves = variables["params"]["dense"]
    assert {n: leaf.shape for n, leaf in leaves.items()} == {
        n: (3, *s.shape) for n, s in quantised_shapes(64, 64).items()
    }
    assert len({leaf.tobytes() for leaf in np.asarray(leaves["codes"])}) == 3

    def one_by_one(x):
        for kernel in jax.vmap(dequantise)(dict(leaves)).astype(jnp.bfloat16):
            x = jnp.tanh(x @ kernel)
        return x

    def scanned(x):
        return stack.apply(variables, x)[0]

    assert scanned(x).dtype == jnp.bfloat16
    assert_close(scanned(x).astype(jnp.float32), one_by_one(x).astype(jnp.float32), 0.02)
    gradients = [jax.jit(jax.grad(lambda x, f=f: f(x).astype(jnp.float32).sum()))(x) for f in (scanned, one_by_one)]
    assert_close(*(g.astype(jnp.float32) for g in gradients), 0.05)


@pytest.mark.parametrize("spec", [COLUMN, ROW])
@pytest.mark.parametrize("features_in", [512, 2752])  # 2752 / 4 cuts through a block, as 11008 / 8 does
def test_sharded_leaves_make_a_sharded_kernel_without_communication(spec, features_in):
    mesh = make_mesh((1, 4, 2))
    leaves = quantise(gaussian(features_in, 1024))

    def place(leaf):
        axes = [a if size % mesh.shape[a] == 0 else None for a, size in zip(spec, leaf.shape, strict=False)]
        return jax.device_put(leaf, NamedSharding(mesh, P(*axes)))

    placed = {n: place(leaf) for n, leaf in leaves.items()}
    assert placed["codes"].addressable_shards[0].data.size == leaves["codes"].size // 8
    compiled = jax.jit(dequantise, out_shardings=NamedSharding(mesh, spec)).lower(placed).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    np.testing.assert_allclose(compiled(placed), dequantise(leaves), rtol=1e-6)


def test_quantising_needs_less_memory_than_half_the_float32_kernel():
    kernel = gaussian(4096, 2048).astype(np.float16).T  # 33 MB in float32
    tracemalloc.start()
    quantise(kernel)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < kernel.size * 4 / 2


def test_seven_billion_weights_take_a_quarter_of_their_bfloat16_bytes():
    def leaves(features_in, features):
        layer = QDense(features_in, features, quant="nf4")
        return jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, features_in)))["params"]

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    shapes = 4 * [(WIDTH, WIDTH)] + 2 * [(WIDTH, MLP)] + [(MLP, WIDTH)]
    linear = LAYERS * sum(size(leaves(*shape)) for shape in shapes)
    weights = LAYERS * sum(a * c for a, c in shapes)
    assert weights == 6_476_005_376
    assert linear == LAYERS * sum(held_bytes(*shape) for shape in shapes)
    assert linear * 8 / weights < 4.1271
    rest = 2 * VOCAB * WIDTH * 2 + (2 * LAYERS + 1) * WIDTH * 4
    assert rest == 2 * VOCAB * WIDTH * 2 + 65 * WIDTH * 4
    assert linear + rest <= 4.2e9
