"""A checkpoint belongs to no mesh: what eight devices saved, four and one continue."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eim_jax.parallel.sharding import make_mesh, param_shardings, shard_params
from eim_jax.training.assembly import state_shardings
from eim_jax.training.checkpoint import StageCheckpoints

SHAPES = {"lm/blocks_0/attn/qkv/kernel": (16, 3, 16), "lm/token_embedding/embedding": (31, 16), "lm/ln_f/scale": (16,)}


def state(mesh, fill):
    """(trained, opt_state) laid out on the mesh."""
    flat = {path: fill(i, shape) for i, (path, shape) in enumerate(SHAPES.items())}
    opt_state = optax.adam(1e-3).init(flat)
    opt_state = jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim == 0 else fill(9, leaf.shape), opt_state)
    return shard_params(flat, mesh), jax.device_put(opt_state, state_shardings(opt_state, flat, mesh))


def numbers():
    return iter(grain.MapDataset.range(20).to_iter_dataset())


def test_a_checkpoint_of_eight_devices_restores_on_four_then_on_one_bit_by_bit(tmp_path):
    def noise(i, shape):
        return jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)

    def zeros(i, shape):
        return jnp.zeros(shape)

    written, batches = state(make_mesh((1, 4, 2)), noise), numbers()
    next(batches)
    held = written
    for step, (shape, devices) in enumerate((((2, 1, 2), 4), ((1, 1, 1), 1)), start=1):
        with StageCheckpoints(tmp_path / str(step)) as store:
            store.save(step, *held, batches, {"seconds": 1.0})
            store.wait()
        mesh, batches = make_mesh(shape, jax.devices()[:devices]), numbers()
        with StageCheckpoints(tmp_path / str(step)) as store:
            reached, *held, _ = store.restore(*state(mesh, zeros), batches)
        assert reached == step and next(batches) == step  # the data goes on where it stood
        for path, where in param_shardings(held[0], mesh).items():
            assert held[0][path].sharding.is_equivalent_to(where, len(SHAPES[path]))
        for one, other in zip(jax.tree.leaves(tuple(held)), jax.tree.leaves(written), strict=True):
            assert len(one.sharding.device_set) == devices
            assert np.array_equal(np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32))
