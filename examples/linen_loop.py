"""The queue loss in a plain Flax linen loop: an encoder learns to find each sample's own key among all of them.

python examples/linen_loop.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import eim_jax

SAMPLES, WIDTH, STEPS, BATCH = 512, 32, 60, 64


class Encoder(nn.Module):
    """Two layers; `st` is what the second stage trains, after `backbone`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs [b a] to queries [b WIDTH]."""
        return nn.Dense(WIDTH, name="st")(nn.tanh(nn.Dense(64, name="backbone")(x)))


def main() -> dict[str, float]:
    """Trains in two stages and returns the last recall@1 of each."""
    keys = jax.random.normal(jax.random.key(0), (SAMPLES, WIDTH))
    inputs = keys @ jax.random.normal(jax.random.key(1), (WIDTH, 24))  # what the encoder sees of each sample
    queue = eim_jax.Queue.of(keys)  # one fixed key a sample, row i is sample i's
    model, recall = Encoder(), {}
    params = model.init(jax.random.key(2), inputs[:1])["params"]
    stages = eim_jax.Stages(params, {"st": {"st/.*": optax.adam(3e-3)}, "all": {".*": optax.adam(3e-3)}})
    for name, stage in stages:
        trained, state = stage.trained, stage.tx.init(stage.trained)

        @jax.jit
        def step(trained, state, index, stage=stage):
            def loss_of(trained):
                found = queue.nce(model.apply({"params": stage.merge(trained)}, inputs[index]), index, tau=0.07)
                return found.loss / found.weight, found.recall1 / found.weight

            grads, recall1 = jax.grad(loss_of, has_aux=True)(trained)
            updates, state = stage.tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, recall1

        for number in range(STEPS):
            index = jax.random.randint(jax.random.key(number), (BATCH,), 0, SAMPLES)
            trained, state, recall1 = step(trained, state, index)
        recall[name] = float(recall1)
        stages.finish(trained)
    print(f"recall@1 among {SAMPLES} keys, chance {1 / SAMPLES:.3f}: {recall}")
    assert jnp.isfinite(stages.params["st"]["kernel"]).all()
    return recall


if __name__ == "__main__":
    main()
