"""examples/torch_loop.py: loss and gradient through dlpack are torch's own."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "examples" / "torch_loop.py"


def test_the_queue_loss_in_a_torch_loop_has_torch_s_value_and_gradient():
    spec = importlib.util.spec_from_file_location("torch_loop", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss, gradient = module.main()
    # A loss of about 8 nats, gradients of about 1/64 / 0.07: float32's rounding of sums of 512 and 32 terms.
    assert loss < 8 * 2e-6 and gradient < 0.22 * 2e-5
