"""ClipCap's model of shared/originals as one of ours."""

import jax.numpy as jnp
import numpy as np
from authors import arrays, dense, norm, original, placed, read_json, read_torch

from eim_jax.models.batch import Batch
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vlm import VLM


class ClipCap:
    """One of the two cases: its folder, its model without parameters, and its settings."""

    def __init__(self, name: str):
        self.name, self.folder = name, original(name)
        self.config = read_json(self.folder / "config.json")
        self.args, gpt2 = self.config["args"], self.config["gpt2"]
        self.tokens = self.args["prefix_length"]
        st = STConfig(
            kind=self.args["mapping_type"],
            width_in=self.config["prefix_size"],
            width_out=gpt2["n_embd"],
            tokens=self.tokens,
            layers=self.args["num_layers"],
            clip_length=self.args["prefix_length_clip"],
        )
        lm = GPT2Config(
            vocab=gpt2["vocab_size"],
            context=gpt2["n_positions"],
            width=gpt2["n_embd"],
            layers=gpt2["n_layer"],
            heads=gpt2["n_head"],
            dropout=gpt2["resid_pdrop"],
        )
        # CLIP is not in these files: its features are, which the ST reads as cached ones.
        width = self.config["prefix_size"]
        vision = CLIPVisionConfig(image_size=4, patch_size=4, width=width, layers=1, heads=1, mlp=4, joint=width)
        text = CLIPTextConfig(vocab=3, context=2, width=4, layers=1, heads=1, mlp=4, joint=width)
        self.vlm = VLM(
            CLIPVision(vision),
            CLIPText(text),
            make_st(st),
            GPT2(lm),
            features="cls",
            normalize=self.args["normalize_prefix"],
        )

    @property
    def train(self) -> tuple[str, ...]:
        """What their script trains."""
        return ("st/.*",) if self.args["only_prefix"] else ("st/.*", "lm/.*")

    def read(self, file: str) -> dict:
        """One of the npz files."""
        return arrays(self.folder / file)

    def weights(self, file: str = "weights.pt") -> dict:
        """A state dict's leaves under our paths."""
        return placed(self.renamed(read_torch(self.folder / file)))

    def renamed(self, held: dict) -> dict:
        """Their keys, or those of gradients, under our paths; what is not there is left out."""
        found = {}
        if any(key.startswith("gpt.transformer.h.") for key in held):
            found |= _gpt2(held, self.config["gpt2"]["n_layer"])
        return found | (_mlp(held) if self.args["mapping_type"] == "mlp" else _transformer(held, self.args))


def batch_of(tokens: np.ndarray, features: np.ndarray) -> Batch:
    """Their padded captions (0 pads, and scores nothing anywhere) with one cached feature each."""
    tokens = np.asarray(tokens, np.int32)
    length = tokens.shape[1] - np.argmax(tokens[:, ::-1] != 0, axis=1)
    valid = np.arange(tokens.shape[1])[None] < length[:, None]
    return Batch(
        index=jnp.arange(len(tokens), dtype=jnp.int32),
        tokens=jnp.asarray(tokens),
        valid=jnp.asarray(valid),
        supervised=jnp.asarray(valid & (tokens != 0)),  # as config.data.ignore_token=0 makes it
        features=jnp.asarray(features, jnp.float32)[:, None],
        has_image=jnp.ones(len(tokens), bool),
    )


def _gpt2(held: dict, layers: int) -> dict:
    root = "gpt.transformer"
    found = {
        "lm/token_embedding/embedding": held[f"{root}.wte.weight"],
        "lm/position_embedding": held[f"{root}.wpe.weight"],
        **norm(held, f"{root}.ln_f", "lm/ln_f"),
    }
    for i in range(layers):
        theirs, ours = f"{root}.h.{i}", f"lm/blocks_{i}"
        found |= norm(held, f"{theirs}.ln_1", f"{ours}/ln_1") | norm(held, f"{theirs}.ln_2", f"{ours}/ln_2")
        # Conv1D is [in out] already; q, k and v stand side by side.
        fused, width = held[f"{theirs}.attn.c_attn.weight"], held[f"{theirs}.attn.c_attn.weight"].shape[0]
        found[f"{ours}/attn/qkv/kernel"] = fused.reshape(width, 3, width)
        found[f"{ours}/attn/qkv/bias"] = held[f"{theirs}.attn.c_attn.bias"].reshape(3, width)
        for name, path in (("attn.c_proj", "attn/out"), ("mlp.c_fc", "mlp/up"), ("mlp.c_proj", "mlp/down")):
            found[f"{ours}/{path}/kernel"] = held[f"{theirs}.{name}.weight"]
            found[f"{ours}/{path}/bias"] = held[f"{theirs}.{name}.bias"]
    return found


def _mlp(held: dict) -> dict:
    return dense(held, "clip_project.model.0", "st/up") | dense(held, "clip_project.model.2", "st/down")


def _transformer(held: dict, args: dict) -> dict:
    root = "clip_project"
    found = dense(held, f"{root}.linear", "st/linear") | {"st/constant": held[f"{root}.prefix_const"]}
    for i in range(args["num_layers"]):
        theirs, ours = f"{root}.transformer.layers.{i}", f"st/blocks_{i}"
        found |= norm(held, f"{theirs}.norm1", f"{ours}/ln_1") | norm(held, f"{theirs}.norm2", f"{ours}/ln_2")
        query, both = held[f"{theirs}.attn.to_queries.weight"], held[f"{theirs}.attn.to_keys_values.weight"]
        key, value = np.split(both, 2)  # their reshape to [2, heads, width of a head]: keys first
        found[f"{ours}/attn/qkv/kernel"] = np.stack([query.T, key.T, value.T], axis=1)
        found |= dense(held, f"{theirs}.attn.project", f"{ours}/attn/out")
        found |= dense(held, f"{theirs}.mlp.fc1", f"{ours}/mlp/up") | dense(
            held, f"{theirs}.mlp.fc2", f"{ours}/mlp/down"
        )
    return found
