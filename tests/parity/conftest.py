"""Live comparison with PyTorch models of transformers; needs the `parity` extra (make parity)."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

TOLERANCE = 1e-4


@pytest.fixture
def agree(record_property):
    """Returns a function that asserts max |ours - theirs| <= 1e-4 max(1, max |theirs|) over every leaf of two trees."""

    def check(name: str, ours, theirs) -> None:
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)

        def error(a, b) -> float:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert a.shape == b.shape
            return float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b))))

        worst = max(jax.tree.leaves(jax.tree.map(error, ours, theirs)))
        print(f"{name}: {worst:.1e}")
        record_property(name, worst)
        assert worst <= TOLERANCE, name

    return check


@pytest.fixture
def perturbed():
    """Returns a function that moves every parameter of a model, so that no bias is 0 and no scale 1."""
    torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")

    def move(model, size: float):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(size * torch.randn_like(parameter))
        return model.eval()

    return move


@pytest.fixture
def saved(tmp_path):
    """Returns a function: model -> its checkpoint directory and that of its gradients (loading is linear)."""

    def save(model) -> tuple[pathlib.Path, pathlib.Path]:
        weights, gradient = tmp_path / "weights", tmp_path / "gradient"
        model.save_pretrained(weights)
        gradient.mkdir()
        (gradient / "config.json").write_text((weights / "config.json").read_text())
        grads = {
            k: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for k, p in model.named_parameters()
        }
        save_file(grads, gradient / "model.safetensors", metadata={"format": "pt"})
        return weights, gradient

    return save
