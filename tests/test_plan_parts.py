"""What a plan is made of: topologies by name, arithmetic from shapes, collectives from a program's text."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec

from eim_jax.config import ConfigError
from eim_jax.parallel.sharding import make_mesh
from eim_jax.planning import plan, targets
from eim_jax.planning.collectives import moved
from eim_jax.utils.flops import work

P = PartitionSpec


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("v5e:4x4", ("tpu", "v5e", 16)),
        ("v5p:2x2x2", ("tpu", "v5p", 8)),
        ("v4:2x2x1", ("tpu", "v4", 4)),
        ("v6e:1x1", ("tpu", "v6e", 1)),
        ("gpu:h100x8", ("gpu", "h100", 8)),
        ("gpu:a100x2x8", ("gpu", "a100", 16)),
        ("gpu:rtx4090x1", ("gpu", "rtx4090", 1)),
        ("cpu:8", ("cpu", "cpu", 8)),
    ],
)
def test_a_topology_is_read_from_its_name(name, found):
    assert targets.parse(name) == found


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:2x2x2", "v5p:2x2", "v3:2x2", "gpu:h100", "gpu:b200x8", "gpu:h100x2x2x8", "cpu:0", ""]
)
def test_a_wrong_topology_is_refused_with_the_valid_forms(name):
    with pytest.raises(
        ConfigError, match=r"v5e: or v6e: and 1x1, 2x2.*a100xN, h100xN, h200xN, l4xN, rtx4090xN.*h100xHOSTSxN; cpu:N"
    ):
        targets.parse(name)


def test_more_fake_devices_than_there_are_is_one_message():
    with pytest.raises(ConfigError, match="9 CPU devices are needed and this process began with 8"):
        targets.target("cpu:9")


def test_products_count_as_often_as_they_run():
    """2 m n k for each product, times a scan's length and a fori_loop's turns; the larger branch of a cond."""
    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)

    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    one = 2 * 8 * 16 * 16
    assert work(jax.make_jaxpr(scanned)(x, w)).flops == 5 * one
    forward_and_back = jax.make_jaxpr(jax.grad(lambda x, w: scanned(x, w).sum(), argnums=1))(x, w)
    assert work(forward_and_back).flops == 5 * 3 * one
    assert work(jax.make_jaxpr(lambda x, w: jax.lax.fori_loop(0, 7, lambda i, x: x @ w[0], x))(x, w)).flops == 7 * one
    branches = jax.make_jaxpr(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0]))(x, w)
    assert work(branches).flops == 2 * one


def test_a_loop_that_says_not_how_often_it_runs_is_named():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    found = work(jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x))(x))
    assert (found.flops, found.unknown) == (2 * 8**3, 1)


def test_work_of_one_device_is_counted_for_all_of_them():
    mesh = make_mesh((1, 8, 1))
    inside = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    found = work(jax.make_jaxpr(inside)(jnp.zeros((16, 4)), jnp.zeros((4, 6))))
    assert found.flops == 2 * 16 * 4 * 6


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("bwd", 5)])
def test_cudnns_attention_is_counted_though_no_product_shows(name, products):
    """Stand-ins of the name that JAX gives its calls, whose shapes say all (tests/test_plan_gpu.py has the calls)."""
    call = Primitive(f"dot_product_attention_{name}_wrapper")
    call.def_abstract_eval(lambda q, k, v: q)
    q, k = (jnp.zeros((2, n, h, 8), jnp.bfloat16) for n, h in ((16, 4), (24, 2)))
    found = work(jax.make_jaxpr(call.bind)(q, k, k))
    assert found.flops == products * 2 * 2 * 4 * 16 * 24 * 8
    assert found.bytes == 2 * (2 * q.size + 2 * k.size)


def collectives(function, *arguments, **kwargs):
    compiled = jax.jit(function, **kwargs).lower(*arguments).compile()
    return moved(compiled.as_text(), 8)


def test_the_collectives_of_a_known_program_are_found_with_their_bytes():
    """Of s bytes over g = 8 devices: all-gather and reduce-scatter send 7/8 s, an all-reduce 2 x 7/8 s."""
    mesh = make_mesh((1, 8, 1))
    on = NamedSharding(mesh, P("fsdp"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=on)
    size = 64 * 32 * 4

    def shards(f, out, **kwargs):
        return jax.shard_map(f, mesh=mesh, in_specs=P("fsdp"), out_specs=out, **kwargs)

    gathered = shards(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P(), check_vma=False)
    assert {c.kind: c.bytes for c in collectives(gathered, x).collectives} == {"all-gather": size * 7 / 8}
    summed = shards(lambda x: jax.lax.psum(x, "fsdp"), P())
    assert collectives(summed, x).total("all-reduce") == 2 * size / 8 * 7 / 8
    permuted = shards(lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]), P("fsdp"))
    assert collectives(permuted, x).total("collective-permute") == size / 8
    scattered = shards(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P("fsdp"))
    assert collectives(scattered, x).total("reduce-scatter") == size / 8 * 7 / 8
    swapped = shards(lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), P("fsdp"))
    assert collectives(swapped, x).total("all-to-all") == size / 8 * 7 / 8


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs():
    mesh = make_mesh((2, 4, 1))

    def body(x):
        return jax.lax.fori_loop(0, 5, lambda i, x: jnp.cos(jax.lax.psum(x, "fsdp")) + i, x)

    looped = jax.shard_map(body, mesh=mesh, in_specs=P("data", None), out_specs=P("data", None), check_vma=False)
    x = jax.ShapeDtypeStruct((2, 16), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    (one,) = collectives(looped, x).collectives
    assert (one.kind, one.group, one.times, one.bytes) == ("all-reduce", 4, 5, 2 * 16 * 4 * 3 / 4)


TPU_TEXT = """
%async_start (p.0: bf16[3072,192]) -> bf16[3072,768] {
  %p.0 = bf16[3072,192]{0,1:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[3072,768]{0,1:T(8,128)(2,1)} all-gather(%p.0), channel_id=5, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}
}

%async_done (p.1: bf16[3072,192]) -> bf16[3072,768] {
  %all-gather.2 = bf16[3072,768]{0,1:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=5, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}
}

%all-reduce-scatter.1 (input.1: bf16[768,3072]) -> bf16[192,3072] {
  %all-reduce.20 = bf16[768,3072]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=16, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%body (wide.p: (s32[])) -> (s32[]) {
  %fusion.3 = bf16[192,3072]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (wide.p.1: (s32[])) -> pred[] {
  %constant.81 = s32[]{:T(128)} constant(32)
  ROOT %lt.61 = pred[]{:T(512)} compare(%i, %constant.81), direction=LT
}

ENTRY %main (param: f32[768]) -> f32[768] {
  %fusion.1 = bf16[3072,768]{1,0} fusion(%param), kind=kCustom, calls=%async_start
  %while.1 = (s32[]{:T(128)}) while(%tuple.1), condition=%condition, body=%body
  %fusion.2 = bf16[3072,768]{1,0} fusion(%param), kind=kCustom, calls=%async_done
  %psum.1 = (f32[40]{0}, f32[40,768]{1,0}) all-reduce(%a, %b), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_the_tpu_compilers_own_forms_are_read():
    """One gather spread over two fusions is one; a fused all-reduce that keeps its part is a reduce-scatter."""
    found = {c.kind: (c.group, c.bytes, c.times) for c in moved(TPU_TEXT, 8).collectives}
    assert found == {
        "all-gather": (4, 3072 * 768 * 2 * 3 / 4, 1),
        "reduce-scatter": (4, 768 * 3072 * 2 * 3 / 4, 32),
        "all-reduce": (4, 2 * (40 + 40 * 768) * 4 * 3 / 4, 1),
    }


GPU_TEXT = """
%body (p: (s32[], f32[16,32])) -> (s32[], f32[16,32]) {
  %all-gather-start.2 = (bf16[2048,8192]{1,0}, bf16[8192,8192]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %all-gather-done.2 = bf16[8192,8192]{1,0} all-gather-done(%all-gather-start.2)
}

%condition (p: (s32[], f32[16,32])) -> pred[] {
  %c = s32[] constant(1)
}

ENTRY %main (param: f32[16,32]) -> f32[64,32] {
  %all-gather-start = ((f32[16,32]{1,0}, f32[16,16]{1,0}), (f32[64,32]{1,0}, f32[64,16]{1,0})) all-gather-start(%a, %b), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %all-gather-done = (f32[64,32]{1,0}, f32[64,16]{1,0}) all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((f32[16,32]{1,0}), f32[4,32]{1,0}) reduce-scatter-start(%a), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %reduce-scatter-done = f32[4,32]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %reduce-scatter-start.1 = ((f32[16,32]{1,0}, f32[16,16]{1,0}), (f32[4,32]{1,0}, f32[4,16]{1,0})) reduce-scatter-start(%a, %b), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %all-reduce-start = (f32[8,32]{1,0}, f32[8]{0}) all-reduce-start(%c, %d), channel_id=5, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %all-reduce-done = (f32[8,32]{1,0}, f32[8]{0}) all-reduce-done(%all-reduce-start)
  %all-reduce-start.1 = f32[8,32]{1,0} all-reduce-start(%c), channel_id=6, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=(0,4,1,5,2,6,3,7) {'axis_1':(1)2}, to_apply=%add
  %all-to-all-start = ((f32[16,32]{0,1}), f32[16,32]{0,1}) all-to-all-start(%a), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
  %collective-permute-start = (f32[16,32]{1,0}, f32[16,32]{1,0}) collective-permute-start(%a), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %while.1 = (s32[], f32[16,32]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
}
"""  # noqa: E501


def test_the_gpu_compilers_started_and_combined_collectives_are_read():
    """The forms of XLA's GPU compiler for 2 hosts x 4 GPUs, bytes by hand: s (g - 1) / g of the whole array s."""
    found = [(c.kind, c.group, c.bytes, c.times) for c in moved(GPU_TEXT, 8).collectives]
    size = 4 * 16  # bytes of a column of 16 rows
    assert found == [
        ("all-gather", 4, 2 * 8192 * 8192 * 3 / 4, 3),
        ("all-gather", 4, 4 * size * (32 + 16) * 3 / 4, 1),
        ("reduce-scatter", 4, size * 32 * 3 / 4, 1),
        ("reduce-scatter", 4, size * (32 + 16) * 3 / 4, 1),
        ("all-reduce", 2, 2 * 4 * (8 * 32 + 8) / 2, 1),
        ("all-reduce", 2, 2 * 4 * 8 * 32 / 2, 1),
        ("all-to-all", 4, size * 32 * 3 / 4, 1),
        ("collective-permute", 8, size * 32, 1),
    ]


def test_without_libtpu_the_stand_in_s_own_compiler_makes_a_tpus_program():
    stand_in = targets.Target("v5e:1x1", targets.CHIPS["v5e"], jax.devices()[:1], "tpu", False, "")
    _, text = plan._compile(jax.jit(lambda x: x + 1).lower(1.0), stand_in)
    assert "HloModule" in text
