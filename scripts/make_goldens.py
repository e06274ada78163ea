"""Writes tests/goldens: tiny random models of transformers (PyTorch), their outputs and their gradients.

Run it with the `parity` extra installed: python scripts/make_goldens.py. `make test` reads the result without
PyTorch. Each model is a checkpoint directory; its gradients are a second one of the same form, because loading is
linear in the arrays.
"""

import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens"
VOCAB, EOS = 50, 47  # of the CLIP; EOS is not the largest id, so that the two pooling rules differ


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model with every parameter moved, so that no bias is 0 and no scale 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save(model: torch.nn.Module, name: str, **values: torch.Tensor) -> None:
    """Writes the model, its gradients (as <name>_gradient) and the named values (<name>.npz)."""
    model.save_pretrained(GOLDENS / name)
    (GOLDENS / name / "generation_config.json").unlink(missing_ok=True)
    gradient = GOLDENS / f"{name}_gradient"
    gradient.mkdir(parents=True, exist_ok=True)
    (gradient / "config.json").write_text((GOLDENS / name / "config.json").read_text())
    grads = {k: p.grad if p.grad is not None else torch.zeros_like(p) for k, p in model.named_parameters()}
    save_file({k: g.numpy() for k, g in grads.items()}, gradient / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(GOLDENS / f"{name}.npz", **{k: v.detach().numpy() for k, v in values.items()})


def gpt2() -> None:
    """GPT-2: hidden states and logits with padding on the right, gradients of the mean next-token cross-entropy."""
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=24, n_layer=3, n_head=4, bos_token_id=96, eos_token_id=96
    )
    model = perturbed(transformers.GPT2LMHeadModel(config))
    tokens = torch.randint(0, 97, (2, 9))
    valid = torch.arange(9)[None] < torch.tensor([[9], [6]])
    out = model(tokens, attention_mask=valid.long(), output_hidden_states=True)
    target = torch.where(valid[:, 1:], tokens[:, 1:], -100)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 97), target.reshape(-1))
    loss.backward()
    save(model, "gpt2", tokens=tokens.int(), valid=valid, hidden=out.hidden_states[-1], logits=out.logits, loss=loss)


def clip() -> None:
    """CLIP: all features of both towers, gradients of their products with probes; the same weights with gelu."""
    text = {
        "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "vocab_size": VOCAB, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": 24, "patch_size": 8,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = perturbed(transformers.CLIPModel(config))
    pixels, tokens = torch.randn(2, 24, 24, 3), torch.randint(0, EOS, (2, 8))
    tokens[0, 2], tokens[0, 5], tokens[0, 7] = VOCAB - 1, EOS, EOS
    tokens[1, 4], tokens[1, 6] = EOS, VOCAB - 1

    def features(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        seen = model.vision_model(pixels.permute(0, 3, 1, 2))
        read = model.text_model(tokens)
        return {
            "seen": seen.last_hidden_state,
            "image": model.visual_projection(seen.pooler_output),
            "hidden": read.last_hidden_state,
            "text": model.text_projection(read.pooler_output),
        }

    values = features(model)
    probes = {f"probe_{k}": torch.randn_like(v) for k, v in values.items()}
    sum((probes[f"probe_{k}"] * v).sum() for k, v in values.items()).backward()

    vision, text = {**vision, "hidden_act": "gelu"}, {**text, "hidden_act": "gelu", "eos_token_id": EOS}
    other = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    other.load_state_dict(model.state_dict())
    gelu = {f"gelu_{k}": v for k, v in features(other.eval()).items()}
    save(model, "clip", pixels=pixels, tokens=tokens.int(), **values, **probes, **gelu)


if __name__ == "__main__":
    torch.manual_seed(0)
    gpt2()
    clip()
