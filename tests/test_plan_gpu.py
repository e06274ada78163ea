"""Programs compiled for GPUs that are not here, where XLA's GPU compiler is installed (extra plan-gpu, 4 GB).

python -m pytest -n 0 -m topology tests/test_plan_gpu.py
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import config_of

from eim_jax.losses.contrastive import queue_nce
from eim_jax.losses.table import queues_of
from eim_jax.models.attention import choose_attention, flash
from eim_jax.parallel.chips import platform_of
from eim_jax.parallel.sharding import batch_sharding, make_mesh, queue_sharding, rows_of_each
from eim_jax.planning import gpus, plan, targets
from eim_jax.planning.collectives import moved
from eim_jax.planning.shapes import abstract_inputs, queue_encoder
from eim_jax.training import arm_model
from eim_jax.utils.flops import work

pytestmark = [
    pytest.mark.topology,
    pytest.mark.skipif(not gpus.has_gpu_compiler(), reason="no CUDA plugin (pip install '.[plan-gpu]')"),
]


def program(function, topology, *shapes):
    """(the text for the topology's devices, temporaries): shapes with shardings."""
    compiled, text = plan._compile(jax.jit(function).lower(*shapes), targets.target(topology))
    return text, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("chip", gpus.DESCRIPTIONS)
def test_every_chip_has_a_program(chip):
    target = targets.target(f"gpu:{chip}x1")
    assert target.exact and target.platform == "cuda"
    assert [platform_of(device) for device in target.devices] == ["cuda"]
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(target.devices[0]))
    text, _ = program(lambda x: x @ x, target.name, x)
    assert "__cublas" in text


def test_collectives_over_two_hosts_have_the_bytes_that_their_definition_says():
    """Of s bytes over g = 4 devices: all-gather and reduce-scatter 3/4 s, two of each combined into one."""
    target = targets.target("gpu:h100x2x4")
    assert sorted({device.process_index for device in target.devices}) == [0, 1]
    mesh = make_mesh((2, 4, 1), target.devices)
    shapes = [
        jax.ShapeDtypeStruct((64, n), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
        for n in (32, 16)
    ]
    size = 64 * (32 + 16) * 4

    def sent(collective, out):
        both = jax.shard_map(
            lambda *x: jax.tree.map(collective, x),
            mesh=mesh,
            in_specs=PartitionSpec("fsdp"),
            out_specs=out,
            check_vma=False,
        )
        found = moved(program(both, target.name, *shapes)[0], 8)
        assert {c.group for c in found.collectives} == {4}
        return found.total()

    assert sent(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), PartitionSpec()) == size * 3 / 4
    scattered = sent(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), PartitionSpec("fsdp"))
    assert scattered == size / 4 * 3 / 4
    assert sent(lambda x: jax.lax.psum(x, "fsdp"), PartitionSpec()) == 2 * size / 4 * 3 / 4


@pytest.mark.parametrize("length", [257, 512])
def test_auto_s_attention_keeps_no_scores_at_any_length(length):
    """Value and gradient, rows split over 8: no float32 array as large as the scores, and nothing moves."""
    target = targets.target("gpu:h100x8")
    held = batch_sharding(make_mesh((1, 8, 1), target.devices))
    x = jax.ShapeDtypeStruct((64, length, 16, 64), jnp.bfloat16, sharding=held)
    choice = choose_attention("cudnn_long", x.dtype, length, length, 64)

    def loss(q, k, v):
        return flash(q, k, v, None, choice).astype(jnp.float32).sum()

    text, temporaries = program(jax.grad(loss, (0, 1, 2)), target.name, x, x, x)
    assert "fmhaSoftmaxBackward" in text
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)]
    assert max(sizes) < 64 // 8 * 16 * length * 64  # one number a query and head is kept
    assert temporaries <= 8.2 * (64 // 8 * 16 * (length + 7) * 64 * 2)  # copies of q, k, v and their gradients
    assert moved(text, 8).total() == 0
    padded = length + -length % 8
    assert work(jax.make_jaxpr(jax.grad(loss))(x, x, x)).flops == 7 * 2 * 64 * 16 * padded**2 * 64


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_cublas_reads_a_queue_where_it_lies_and_codes_are_widened_a_chunk_at_a_time(dtype):
    """Two products, each of the whole queue, and no copy of it; int8's are of chunks."""
    target, width = targets.target("gpu:h100x8"), 512
    mesh = make_mesh((8, 1, 1), target.devices)
    count = 8 * 256 * 1024 - 50
    rows = rows_of_each(count, mesh)  # filled up: else there were copies for that
    assert rows == 256 * 1024
    held, split = queue_sharding(mesh), batch_sharding(mesh)
    query = jax.ShapeDtypeStruct((40, width), jnp.float32, sharding=split)
    keys = jax.ShapeDtypeStruct((8 * rows, width), jnp.dtype(dtype), sharding=held)
    index = jax.ShapeDtypeStruct((40,), jnp.int32, sharding=split)
    scale = jax.ShapeDtypeStruct((8 * rows,), jnp.float32, sharding=held) if dtype == "int8" else None

    def gradient(query, keys, index, scale):
        return jax.grad(lambda q: queue_nce(q, keys, index, count=count, scale=scale, mesh=mesh).loss)(query)

    text, temporaries = program(gradient, target.name, query, keys, index, scale)
    assert len(re.findall(r"__cublas\$lt\$matmul", text)) == 2
    of_queue = re.findall(rf"= \w+\[{rows},{width}\]\S* ([\w-]+)\(", text)
    assert set(of_queue) <= {"parameter", "get-tuple-element", "bitcast"}
    if dtype == "bfloat16":
        assert " while(" not in text
        assert temporaries < 2.5 * 40 * rows * 2 * 4  # of the scores, which are split into two halves
    else:
        assert temporaries < rows * width  # not even the codes once more


def test_a_queue_of_another_number_of_rows_is_not_copied_whole():
    target, rows, width = targets.target("gpu:h100x1"), 256 * 1024 + 3, 512
    mesh = make_mesh((1, 1, 1), target.devices)
    query = jax.ShapeDtypeStruct((40, width), jnp.float32, sharding=batch_sharding(mesh))
    keys = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=queue_sharding(mesh))
    index = jax.ShapeDtypeStruct((40,), jnp.int32, sharding=batch_sharding(mesh))

    def gradient(query, keys, index):
        return jax.grad(lambda q: queue_nce(q, keys, index, count=rows, mesh=mesh).loss)(query)

    text, temporaries = program(gradient, target.name, query, keys, index)
    assert not re.findall(rf"= bf16\[{rows + 5},{width}\]", text) and temporaries < rows * width


def test_a_stage_is_planned_by_the_gpu_s_own_compiler():
    changes = {"data.scenes": 24, "arms": ("eim",), "arm.eim.sequence": ("st",), "arm.eim.prompts": 0}
    config = config_of("miniature", **changes, **{"stages.st.batch": 8, "stages.st.warmup_steps": 5})
    (found,), notes = plan.plan(config, targets.target("gpu:l4x8"), samples=100)
    assert found.fits and found.memory.temporaries > 0 and found.sent["all-gather"] > 0
    assert any("cuDNN's flash kernel where" in note for note in notes)


def test_the_encoder_of_a_queue_is_compiled_with_the_options_of_the_stages():
    """CLIP.text at full size, split over 8: a product of 96 columns, which Triton's products do not take untimed."""
    config, target = config_of("clipcap_eim_coco"), targets.target("gpu:h100x8")
    inputs, _ = abstract_inputs(config, make_mesh((1, 8, 1), target.devices), platform=target.platform)
    vlm = arm_model.model(inputs, config.arm["eim"])
    [kind] = queues_of(config.stages["ie"])
    step, arguments = queue_encoder(inputs, vlm, kind, plan.placed(inputs.towers, inputs.mesh))
    temporaries, known = plan._encoder_temporaries(step, arguments, target)
    assert known and 2**30 < temporaries < 2**31  # 157,696 tokens a device
