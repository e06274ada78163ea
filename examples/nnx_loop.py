"""The queue loss in a Flax NNX + optax loop.

python examples/nnx_loop.py
"""

import jax
import optax
from flax import nnx

import eim_jax

SAMPLES, WIDTH, STEPS, BATCH = 512, 32, 80, 64


class Encoder(nnx.Module):
    """Two linear layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(24, 64, rngs=rngs), nnx.Linear(64, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs [b 24] to queries [b WIDTH]."""
        return self.down(nnx.tanh(self.up(x)))


def main() -> tuple[float, float]:
    """Trains and returns recall@1 of the first and of the last step."""
    keys = jax.random.normal(jax.random.key(0), (SAMPLES, WIDTH))
    inputs = keys @ jax.random.normal(jax.random.key(1), (WIDTH, 24))
    queue = eim_jax.Queue.of(keys)  # a pytree with a static count: it passes through jit like any argument
    model = Encoder(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, queue, index):
        def loss_of(model):
            found = queue.nce(model(inputs[index]), index, tau=0.07)
            return found.loss / found.weight, found.recall1 / found.weight

        (_, recall1), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
        optimizer.update(model, grads)
        return recall1

    recalls = []
    for number in range(STEPS):
        index = jax.random.randint(jax.random.key(number), (BATCH,), 0, SAMPLES)
        recalls.append(float(step(model, optimizer, queue, index)))
    print(f"recall@1 among {SAMPLES} keys: {recalls[0]:.2f} -> {recalls[-1]:.2f}")
    return recalls[0], recalls[-1]


if __name__ == "__main__":
    main()
