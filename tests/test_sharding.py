"""The mesh and the rules: every parameter has one place, and places change no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import assert_trees_close
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, PartitionSpec

from eim_jax.models.adapters.lavin import Router
from eim_jax.models.adapters.llama_adapter import ZeroInit
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.parallel.sharding import batch_sharding, make_mesh, param_spec, queue_sharding, shard_params, table

P = PartitionSpec
LLAMAS = {
    "plain": {},
    "tied": {"tied": True},
    "biases": {"qkv_bias": True},
    "4 bits": {"quant": "nf4"},
    "LaVIN": {"adapter": Router()},
    "LaVIN in 4 bits": {"adapter": Router(), "quant": "nf4"},
    "LLaMA-Adapter": {"adapter": ZeroInit(prompts=3, layers=2)},
}


def towers(scan: bool, st: str, layers: int = 2) -> dict:
    small = dict(width=32, layers=layers, heads=2)
    clip = dict(mlp=64, joint=16, activation="quick_gelu", scan=scan, **small)
    pixels, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 4), jnp.int32)
    return {
        "visual": (CLIPVision(CLIPVisionConfig(32, 8, prompts=2, prompt_hidden=8, **clip)), pixels),
        "text": (CLIPText(CLIPTextConfig(vocab=50, context=16, eos_id=3, **clip)), tokens),
        "st": (
            make_st(STConfig(kind=st, width_in=32, width_out=32, hidden=64, layers=2, heads=2)),
            jnp.zeros((1, 1, 32)),
        ),
        "lm": (GPT2(GPT2Config(vocab=50, context=16, scan=scan, **small)), tokens),
    }


def shapes(scan: bool, st: str = "ffn") -> dict:
    init = {
        name: functools.partial(module.init, jax.random.key(0), x) for name, (module, x) in towers(scan, st).items()
    }
    return flatten_dict({name: jax.eval_shape(f)["params"] for name, f in init.items()}, sep="/")


def test_make_mesh_gives_the_rest_to_the_axis_of_size_minus_one():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh((-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh((1, 1, 1), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert make_mesh().axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize("shape", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (16, 1, 1), (0, -1, 1)])
def test_make_mesh_refuses_a_shape_that_does_not_fit_the_devices(shape):
    with pytest.raises(ValueError, match="8 devices"):
        make_mesh(shape)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("st", ["mlp", "transformer", "ffn"])
def test_every_parameter_of_every_tower_has_a_rule(scan, st):
    mesh = make_mesh((2, 2, 2))
    flat = shapes(scan, st)
    assert [row.path for row in table(flat, mesh)] == sorted(flat)


def llama(change: dict, scan: bool = False) -> Llama:
    small = {"vocab": 50, "context": 16, "width": 128, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 256}
    return Llama(LlamaConfig(**small, scan=scan, **change))


def llama_shapes(change: dict, scan: bool = False) -> dict:
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return flatten_dict({"lm": jax.eval_shape(llama(change, scan).init, jax.random.key(0), tokens)["params"]}, sep="/")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("change", LLAMAS.values(), ids=LLAMAS)
def test_every_parameter_of_every_llama_has_a_rule_and_its_kernels_are_split(change, scan):
    flat, mesh = llama_shapes(change, scan), make_mesh((1, 4, 2))
    rows = {row.path: row for row in table(flat, mesh)}
    assert rows.keys() == flat.keys()
    for path, row in rows.items():
        if path.startswith("lm/blocks") and path.endswith(("kernel", "codes")):
            assert row.bytes * 8 == flat[path].size * flat[path].dtype.itemsize


def test_every_parameter_of_clips_adapters_has_a_rule():
    small = {"width": 32, "layers": 2, "heads": 2, "mlp": 64, "joint": 16}
    for scan in (False, True):
        clip = CLIPVision(CLIPVisionConfig(32, 8, adapter=Router(), scan=scan, **small))
        params = jax.eval_shape(clip.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        flat = flatten_dict({"visual": params}, sep="/")
        adapters = {row.path for row in table(flat, make_mesh((2, 2, 2))) if "/adapter/" in row.path}
        assert adapters == {f"visual/adapter/{x}/{y}" for x in ("router", "down", "up") for y in ("kernel", "bias")}


def test_golden_specs_of_llama():
    mesh = make_mesh((2, 2, 2))
    columns, rows = ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"), ("attn/out", "mlp/down")
    golden = {
        "lm/token_embedding/embedding": P("tensor", "fsdp"),
        "lm/head/kernel": P("fsdp", "tensor"),
        "lm/norm_f/scale": P(),
        "lm/blocks_0/norm_1/scale": P(),
        **{f"lm/blocks_0/{x}/{leaf}": P("fsdp", "tensor") for x in columns for leaf in ("codes", "scale")},
        **{f"lm/blocks_1/{x}/{leaf}": P("tensor", "fsdp") for x in rows for leaf in ("codes", "scale")},
        "lm/blocks_1/mlp/down/scale_mean": P(),
        "lm/adapter/modality": P(None, "fsdp"),
        "lm/adapter/router/kernel": P(None, "fsdp"),
        "lm/adapter/up/kernel": P(None, None, None, None, "fsdp"),
        "lm/adapter/up/bias": P(None, None, "fsdp"),
    }
    found = {row.path: row.spec for row in table(llama_shapes(LLAMAS["LaVIN in 4 bits"]), mesh)}
    assert {path: found[path] for path in golden} == golden
    plain = {row.path: row.spec for row in table(llama_shapes({}), mesh)}
    for path, spec in plain.items():  # in 4 bits as in plain form
        if path.startswith("lm/blocks") and path.endswith("kernel"):
            assert found[path.replace("kernel", "codes")] == spec


def test_golden_specs():
    mesh = make_mesh((2, 2, 2))
    golden = {
        "visual/class_embedding": P(),
        "visual/patch_embedding/kernel": P(None, None, None, "fsdp"),
        "visual/blocks_0/attn/qkv/kernel": P("fsdp", None, "tensor"),
        "visual/blocks_0/attn/qkv/bias": P(None, "tensor"),
        "visual/blocks_0/attn/out/kernel": P("tensor", "fsdp"),
        "visual/blocks_0/attn/out/bias": P(),
        "visual/projection/kernel": P("fsdp", "tensor"),
        "visual/prompt/up/kernel": P(None, "fsdp", "tensor"),
        "visual/prompt/tokens": P(None, None, "fsdp"),
        "text/token_embedding/embedding": P("tensor", "fsdp"),
        "lm/blocks_1/mlp/up/kernel": P("fsdp", "tensor"),
        "lm/blocks_1/mlp/down/kernel": P("tensor", "fsdp"),
        "lm/ln_f/scale": P(),
        "st/up/kernel": P("fsdp", "tensor"),
    }
    rows = {row.path: row for row in table(shapes(scan=False), mesh)}
    assert {path: rows[path].spec for path in golden} == golden
    assert rows["lm/blocks_1/mlp/up/kernel"].bytes == 32 * 128 * 4 // 4


def test_a_scanned_stack_keeps_its_layer_axis_whole_and_the_layers_specs():
    mesh = make_mesh((2, 2, 2))
    unrolled = {row.path: row.spec for row in table(shapes(scan=False), mesh)}
    for row in table(shapes(scan=True), mesh):
        layer = unrolled[row.path.replace("/blocks/", "/blocks_0/")]
        if "/blocks/" in row.path and len(layer):
            assert row.spec == P(None, *layer)
        else:
            assert row.spec == layer


def test_an_axis_that_does_not_divide_its_dimension_splits_the_rules_other_one_or_nothing():
    mesh = make_mesh((1, 4, 2))
    assert param_spec("lm/token_embedding/embedding", (50257, 768), mesh) == P(None, ("fsdp", "tensor"))
    assert param_spec("lm/token_embedding/embedding", (50257, 12), mesh) == P(None, "fsdp")
    assert param_spec("st/up/kernel", (30, 64), mesh) == P(None, ("tensor", "fsdp"))
    assert param_spec("st/up/kernel", (30, 63), mesh) == P("tensor", None)
    assert param_spec("lm/ln_f/scale", (64,), mesh) == P()


def test_an_unknown_path_and_a_short_shape_are_refused():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="lm/mystery"):
        param_spec("lm/mystery", (4,), mesh)
    with pytest.raises(ValueError, match="longer than its shape"):
        param_spec("st/up/kernel", (4,), mesh)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_table_shows_what_each_device_really_holds(shape):
    mesh = make_mesh(shape)
    flat = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes(scan=False).items()}
    placed = shard_params(flat, mesh)
    for row in table(flat, mesh):
        held = {shard.data.nbytes for shard in placed[row.path].addressable_shards}
        assert held == {row.bytes}
        assert placed[row.path].sharding.spec == row.spec


def test_rows_of_batches_and_queues_lie_over_data_and_fsdp():
    mesh = make_mesh((2, 2, 2))
    for sharding in (batch_sharding(mesh), queue_sharding(mesh)):
        assert sharding.shard_shape((16, 3)) == (4, 3)


@pytest.mark.parametrize(("tower", "scan"), [("visual", False), ("lm", True)])
def test_sharded_towers_compute_what_one_device_does(tower, scan):
    module, _ = towers(scan, "ffn", layers=1)[tower]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 32, 32, 3)).astype(np.float32) if tower == "visual" else rng.integers(0, 50, (8, 4))
    params = tiny.loud(module.init, jnp.asarray(x))

    @jax.jit
    def value_and_grad(params, x):
        def value(params):
            return sum(jnp.mean(jnp.square(leaf)) for leaf in jax.tree.leaves(module.apply({"params": params}, x)))

        return jax.value_and_grad(value)(params)

    single = value_and_grad(params, x)
    mesh = make_mesh((2, 2, 2))
    flat = shard_params(flatten_dict({tower: params}, sep="/"), mesh)
    sharded = value_and_grad(unflatten_dict(flat, sep="/")[tower], jax.device_put(x, batch_sharding(mesh)))
    assert_trees_close(sharded, single, 1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "scan"), [("LaVIN in 4 bits", True), ("LLaMA-Adapter", False)])
def test_a_sharded_llama_answers_and_learns_as_on_one_device(name, scan):
    """Logits, and the gradient of the adapter, with grouped heads, on (data 2, fsdp 2, tensor 2)."""
    module, rng = llama(LLAMAS[name], scan), np.random.default_rng(0)
    tokens, pictured = jnp.asarray(rng.integers(0, 50, (8, 5)), jnp.int32), jnp.arange(8) % 3 > 0
    visual = None if "LaVIN" in name else jnp.asarray(rng.standard_normal((8, 3, 128)), jnp.float32)
    params = tiny.loud(module.init, tokens)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params["adapter"])
    rest = {k: x for k, x in params.items() if k != "adapter"}

    @jax.jit
    def learn(adapter, rest, tokens, pictured, visual):
        def method(lm):
            return lm.logits(lm.hidden(lm.embed(tokens), steer=lm.steer(visual, pictured))[0])

        def loss(adapter):
            logits = module.apply({"params": {**rest, "adapter": adapter}}, method=method)
            return jnp.mean(jnp.sin(logits)), logits

        return jax.value_and_grad(loss, has_aux=True)(adapter)

    single = learn(adapter, rest, tokens, pictured, visual)
    mesh = make_mesh((2, 2, 2))
    placed = shard_params(flatten_dict({"lm": {**rest, "adapter": adapter}}, sep="/"), mesh)
    placed = unflatten_dict(placed, sep="/")["lm"]
    rows = jax.device_put((tokens, pictured, visual), batch_sharding(mesh))
    sharded = learn(placed.pop("adapter"), placed, *rows)
    assert_trees_close(sharded, single, 1e-5, rtol=1e-4)
