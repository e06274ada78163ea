"""The queue loss in a PyTorch loop: queries and gradients cross by dlpack, without a copy on one device.

python examples/torch_loop.py      # needs torch
"""

import jax
import torch

import eim_jax

SAMPLES, WIDTH, STEPS, BATCH = 512, 32, 60, 64


class QueueLoss(torch.autograd.Function):
    """Mean loss of a batch of queries against a queue; the one pass over the keys gives loss and gradient together."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, index: torch.Tensor, queue: eim_jax.Queue, tau: float) -> torch.Tensor:
        """Takes queries [b D] and their rows [b]; returns the mean loss."""
        loss, gradient = _value_and_grad(jax.dlpack.from_dlpack(query.detach().contiguous()), index.numpy(), queue, tau)
        ctx.save_for_backward(torch.from_dlpack(gradient))
        return torch.from_dlpack(loss)

    @staticmethod
    def backward(ctx, *cotangent: torch.Tensor) -> tuple:
        """Returns the gradient of the queries."""
        return cotangent[0] * ctx.saved_tensors[0], None, None, None


@jax.jit
def _value_and_grad(query, index, queue, tau):
    return jax.value_and_grad(lambda query: queue.nce(query, index, tau=tau).loss / query.shape[0])(query)


def torch_loss(query: torch.Tensor, index: torch.Tensor, keys: torch.Tensor, tau: float) -> torch.Tensor:
    """The same in torch alone, which holds all scores [b N]: what the example is checked against."""
    unit = torch.nn.functional.normalize
    return torch.nn.functional.cross_entropy(unit(query, dim=1) @ unit(keys, dim=1).T / tau, index)


def main() -> tuple[float, float]:
    """Checks loss and gradient against torch's own, then trains; returns the largest differences."""
    torch.manual_seed(0)
    keys = torch.randn(SAMPLES, WIDTH)
    queue = eim_jax.Queue.of(keys.numpy())
    inputs = keys @ torch.randn(WIDTH, 24)
    index = torch.randint(0, SAMPLES, (BATCH,))
    ours, theirs = torch.randn(BATCH, WIDTH, requires_grad=True), None
    theirs = ours.detach().clone().requires_grad_()
    one, other = QueueLoss.apply(ours, index, queue, 0.07), torch_loss(theirs, index, keys, 0.07)
    one.backward(), other.backward()
    off = float((one - other).detach().abs()), float((ours.grad - theirs.grad).abs().max())
    print(f"against torch: loss off by {off[0]:.1e}, gradient by {off[1]:.1e}")

    model = torch.nn.Sequential(torch.nn.Linear(24, 64), torch.nn.Tanh(), torch.nn.Linear(64, WIDTH))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        index = torch.randint(0, SAMPLES, (BATCH,))
        loss = QueueLoss.apply(model(inputs[index]), index, queue, 0.07)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {float(loss):.3f}")
    return off


if __name__ == "__main__":
    main()
