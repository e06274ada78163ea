"""What the compiled training steps hold and move: parameters split, rows split, queues never gathered."""

import math
import re

import jax
import jax.numpy as jnp
import mesh_cases
import pytest

from eim_jax.losses.contrastive import queue_nce
from eim_jax.parallel.sharding import batch_sharding, make_mesh, queue_sharding, table
from eim_jax.planning.collectives import moved
from eim_jax.planning.shapes import abstract_inputs
from eim_jax.training import arm_model

N = 1_000_000
# Added to the residual stream, or reading it without a ROW behind: whole over "tensor" by intent.
STREAM = r"\w+/(position_embedding|patch_embedding/kernel|adapter/.*|prompt/tokens)|.*/blocks/.*(scale|bias)"
FULL = [
    ("clipcap_eim_coco", {}),
    ("clipcap_large_coco", {"towers.scan": True}),
    ("llama_adapter_eim_scienceqa", {}),
    ("lavin7b_eim_scienceqa", {}),
    ("lavin7b_eim_scienceqa", {"towers.scan": False, "towers.quant": "nf4"}),
]


@pytest.mark.parametrize(("name", "changes"), FULL, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "as is")
def test_at_full_size_no_large_leaf_lies_whole_where_it_could_be_split(name, changes):
    config = mesh_cases.config_of(name, **changes)
    arm = config.arm[config.arms[0]]
    inputs, _ = abstract_inputs(config, make_mesh(), platform="tpu")
    flat = arm_model.shapes(inputs, arm, arm_model.model(inputs, arm))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in flat.values())
    for shape in ((1, 8, 1), (1, 4, 2), (2, 2, 2)):
        rows = table(flat, make_mesh(shape))
        assert sum(row.bytes for row in rows) <= 1.02 * total / (shape[1] * shape[2])
        for row in rows:
            if math.prod(row.shape) * flat[row.path].dtype.itemsize >= 1 << 20 and not re.fullmatch(STREAM, row.path):
                assert row.bytes * shape[1] * shape[2] == flat[row.path].size * flat[row.path].dtype.itemsize, row
    assert any(re.fullmatch(STREAM, path) for path in flat)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return mesh_cases.small_towers(tmp_path_factory.mktemp("towers"))


def compiled(towers, stage, mesh, batch, samples=N):
    """ClipCap-EIM's stage with a queue of so many samples: (its arguments' shapes, compiled from shapes)."""
    return mesh_cases.compiled(
        mesh, stage, towers["clip"], towers["gpt2"], "clipcap", "eim", samples=samples, batch=batch
    )


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("stage", ["st", "lm", "ie"])
def test_no_collective_of_a_step_is_anywhere_near_a_queue(towers, stage, mesh):
    arguments, step = compiled(towers, stage, mesh, 64)
    (queue,) = arguments[4].values()
    held = math.prod(queue.keys.sharding.shard_shape(queue.keys.shape)) * 4
    assert held * mesh[0] * mesh[1] == queue.keys.size * 4  # split by row over data and fsdp
    found = moved(step.as_text(), 8)
    assert found.collectives and found.counted_once == 0
    assert max(one.bytes for one in found.collectives) < held / 100
    assert step.memory_analysis().temp_size_in_bytes < held  # no copy of a device's keys either


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
def test_the_queue_loss_moves_queries_and_their_gradients_alone(mesh):
    """A query to all, the own key and the weighted sum of keys back: three times b x D, whatever N."""
    b, width, mesh = 64, 32, make_mesh(mesh)
    rows, held = batch_sharding(mesh), queue_sharding(mesh)
    shapes = (
        jax.ShapeDtypeStruct((b, width), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((N, width), jnp.float32, sharding=held),
        jax.ShapeDtypeStruct((b,), jnp.int32, sharding=rows),
    )

    def loss(query, keys, index):
        return queue_nce(query, keys, index, count=N, mesh=mesh).loss

    text = jax.jit(jax.value_and_grad(loss), out_shardings=(None, rows)).lower(*shapes).compile().as_text()
    assert moved(text, 8).total() <= 4 * (5 * b * width + 20 * b)  # an all-reduce sends its size twice


def test_activations_of_a_step_are_split_by_rows(towers):
    """An eighth of one device's temporaries, where activations are most of them: no device holds all rows."""
    sizes = {}
    for mesh in ((1, 1, 1), (8, 1, 1), (1, 8, 1)):
        _, step = compiled(towers, "lm", mesh, 1024, samples=64)
        sizes[mesh] = step.memory_analysis().temp_size_in_bytes
    whole = sizes.pop((1, 1, 1))
    assert max(sizes.values()) < whole / 6, (sizes, whole)


def test_fully_sharded_parameters_are_gathered_and_not_activations(towers):
    """On (1, 8, 1) what a step moves is a few times the parameters, at any batch."""
    arguments, step = compiled(towers, "lm", (1, 8, 1), 1024, samples=64)
    trained = sum(leaf.size * 4 for leaf in arguments[0].values())
    embedded = 1024 * arguments[3].tokens.shape[1] * 32 * 4 / 8  # a device's rows of the stream
    # Gathered for both passes and reduced once; the embeddings change hands from columns to rows, and back.
    assert moved(step.as_text(), 8).total() < 4.5 * trained + 4 * embedded


def test_llama_adapters_prompts_pass_through_maps_that_their_block_has_gathered(towers):
    """On (1, 8, 1): the key and value maps are gathered layer by layer in both passes, and never as a stack."""
    _, step = mesh_cases.compiled(
        (1, 8, 1), "adapter", towers["clip"], towers["llama"], "llama_adapter", "eim", batch=64
    )
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", step.as_text())
    assert gathered.count("64,32") == 4  # k and v, of 64 numbers in 2 heads of 16, forward and backward
    assert not [dims for dims in gathered if re.fullmatch(r"\d+,64,32", dims)]


def test_tensor_parallel_blocks_move_four_activations_a_layer(towers):
    """Megatron's count on (1, 1, 2): after attention and MLP, forward and backward; queries stay with their heads."""
    arguments, step = compiled(towers, "lm", (1, 1, 2), 64)
    stream = 64 * arguments[3].tokens.shape[1] * 32 * 4
    assert moved(step.as_text(), 2).total() < (4 * 2 + 3) * stream


def test_lavin_in_four_bits_moves_codes_and_leaves_clips_rows_where_they_are(towers):
    """On (1, 8, 1): no MLP of the LM is gathered in floats; what is summed is less than one of CLIP's activations."""
    case = (towers["clip"], towers["llama"], "lavin", "eim")
    _, step = mesh_cases.compiled((1, 8, 1), "ie", *case, quant="nf4", batch=64, samples=64)
    text = step.as_text()
    assert moved(text, 8).total("all-reduce") < 64 * 17 * 48 * 4  # rows x tokens x width: one of dozens
    assert re.search(r"= u8\[\S* all-gather\(", text)
    assert not re.search(r"= f32\[(64,128|128,64)\]\S* all-gather\(", text)
