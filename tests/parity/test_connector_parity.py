import jax
import jax.numpy as jnp
import pytest

from eim_jax.models.connector import STConfig, make_st

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity needs PyTorch: pip install '.[parity]'")


def test_transformer_mapper_agrees_with_torchs_own_attention(agree):
    """torch.nn.functional does attention, norms and linear maps; queries and keys-values as in ClipCap."""
    functional = torch.nn.functional
    config = STConfig(kind="transformer", width_in=12, width_out=32, tokens=4, layers=2, heads=4, clip_length=3)
    st = make_st(config)
    torch.manual_seed(0)
    seen = torch.randn(2, 1, 12)
    shapes = jax.eval_shape(st.init, jax.random.key(0), jnp.zeros((2, 1, 12)))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    theirs = [(0.2 * torch.randn(x.shape)).requires_grad_() for x in leaves]
    p = jax.tree.unflatten(tree, theirs)

    def dense(p, x):
        return functional.linear(x, p["kernel"].T, p.get("bias"))

    def norm(p, x):
        return functional.layer_norm(x, (32,), p["scale"], p["bias"])

    x = torch.cat([dense(p["linear"], seen[:, 0]).reshape(2, 3, 32), p["constant"].expand(2, 4, 32)], dim=1)
    for i in range(2):
        b = p[f"blocks_{i}"]
        qkv = torch.einsum("btd,dke->kbte", norm(b["ln_1"], x), b["attn"]["qkv"]["kernel"])
        q, k, v = (a.reshape(2, 7, 4, 8).transpose(1, 2) for a in qkv)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 32)
        x = x + dense(b["attn"]["out"], mixed)
        x = x + dense(b["mlp"]["down"], functional.relu(dense(b["mlp"]["up"], norm(b["ln_2"], x))))
    out = x[:, 3:]
    probe = torch.randn_like(out)
    (out * probe).sum().backward()

    def ours(params):
        out = st.apply({"params": params}, jnp.asarray(seen.numpy()))
        return jnp.sum(out * probe.numpy()), out

    params = jax.tree.unflatten(tree, [jnp.asarray(x.detach().numpy()) for x in theirs])
    grads, value = jax.jit(jax.grad(ours, has_aux=True))(params)
    agree("output", value, out.detach().numpy())
    agree("gradient", grads, jax.tree.unflatten(tree, [x.grad.numpy() for x in theirs]))
