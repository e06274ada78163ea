"""The same training steps in PyTorch with transformers' modules: bfloat16 autocast, fused AdamW, torch.compile.

Parameters that train are float32, others lie in the compute dtype, as in eim_jax. Prompts are keys and values only, so
that no side computes more than the other.
"""

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

TAU = 0.07


class Step:
    """One update at each call of `run`; `wait` returns when the device is done."""

    def __init__(self, model: nn.Module, inputs: tuple, dtype: torch.dtype, compiled: bool, lr: float = 2e-5):
        self.model, self.inputs, self.device = model, inputs, inputs[0].device
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=lr, eps=1e-6, weight_decay=0.0, fused=True)
        self.dtype = dtype
        self.forward = torch.compile(model, dynamic=False) if compiled else model

    def run(self) -> torch.Tensor:
        """Returns the loss, which may still be under way."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.forward(*self.inputs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def wait(device: torch.device) -> None:
    """Returns when the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def queue_loss(query, keys, index, tau: float = TAU):
    """The contrastive loss by its definition: every score is there, autograd keeps what it wants."""
    scores = functional.normalize(query.float(), dim=1).to(keys.dtype) @ keys.T
    return functional.cross_entropy(scores.float() / tau, index)


class Prompted(nn.Module):
    """transformers' CLIP vision tower with deep prompts as keys and values of every layer; returns [b n width]."""

    def __init__(self, config: transformers.CLIPVisionConfig, prompts: int, hidden: int):
        super().__init__()
        whole = transformers.CLIPVisionModelWithProjection(config)
        self.whole = whole.requires_grad_(False)
        layers, width = config.num_hidden_layers, config.hidden_size
        draw = [(layers, prompts, width), (layers, width, hidden), (layers, 1, hidden), (layers, hidden, width)]
        self.tokens, self.up, self.up_bias, self.down = (nn.Parameter(0.02 * torch.randn(s)) for s in draw)
        self.down_bias = nn.Parameter(torch.zeros(layers, 1, width))
        mean, std = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images):  # noqa: D102
        tower = getattr(self.whole.vision_model, "vision_model", self.whole.vision_model)
        pixels = (images.permute(0, 3, 1, 2) / 255.0 - self.mean) / self.std
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        prompts = torch.baddbmm(
            self.down_bias, torch.tanh(torch.baddbmm(self.up_bias, self.tokens, self.up)), self.down
        )
        for layer, prompt in zip(tower.encoder.layers, prompts, strict=True):
            z, p = layer.layer_norm1(x), layer.layer_norm1(prompt)
            attention, heads = layer.self_attn, layer.self_attn.num_heads

            def split(y, heads=heads):
                return y.unflatten(-1, (heads, -1)).transpose(-3, -2)

            def both(linear, z=z, p=p):
                return split(torch.cat([linear(z), linear(p).expand(len(z), -1, -1)], dim=1))

            q, k, v = split(attention.q_proj(z)), both(attention.k_proj), both(attention.v_proj)
            mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + attention.out_proj(mixed)
            x = x + layer.mlp(layer.layer_norm2(x))
        return x

    def project(self, seen):
        """[CLS] through CLIP's frozen output layer."""
        tower = getattr(self.whole.vision_model, "vision_model", self.whole.vision_model)
        return self.whole.visual_projection(tower.post_layernorm(seen[:, 0]))


class ClipCap(nn.Module):
    """A stage of ClipCap-EIM, or ClipCap's own ("base"): forward returns the stage's loss.

    Inputs by stage: base (features [b 1 joint], tokens), st (features [b n width], keys, index),
    lm (tokens, keys, index), ie (images, tokens, keys, index).
    """

    def __init__(self, stage: str, size, dropout: float):
        super().__init__()
        self.stage, (v, c) = stage, (size.visual, size.lm)
        if stage == "ie":
            shape = {"hidden_size": v.width, "intermediate_size": v.mlp, "num_hidden_layers": v.layers}
            shape |= {"num_attention_heads": v.heads, "image_size": v.image_size, "patch_size": v.patch_size}
            config = transformers.CLIPVisionConfig(**shape, projection_dim=v.joint)
            self.visual = Prompted(config, 10, size.prompt_hidden)
        if stage == "base":
            inner = c.width * 10 // 2
            self.st = nn.Sequential(nn.Linear(v.joint, inner), nn.Tanh(), nn.Linear(inner, 10 * c.width))
        elif stage != "lm":
            self.st = nn.Sequential(nn.Linear(v.width, 4 * v.width), nn.GELU(), nn.Linear(4 * v.width, c.width))
        if stage != "st":
            drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
            shape = {
                "vocab_size": c.vocab,
                "n_embd": c.width,
                "n_layer": c.layers,
                "n_head": c.heads,
                "bos_token_id": None,
            }
            shape["eos_token_id"] = None
            self.lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **drops))

    def forward(self, *inputs):  # noqa: D102
        if self.stage == "st":
            features, keys, index = inputs
            return queue_loss(self.st(features).float().mean(1), keys, index)
        if self.stage == "lm":
            tokens, keys, index = inputs
            return queue_loss(self.lm.transformer(tokens, use_cache=False).last_hidden_state[:, -1], keys, index)
        if self.stage == "base":
            features, tokens = inputs
            return self.caption(self.st(features[:, 0]).unflatten(-1, (10, -1)), tokens)
        images, tokens, keys, index = inputs
        seen = self.visual(images)
        return self.caption(self.st(seen), tokens) + queue_loss(self.visual.project(seen), keys, index)

    def caption(self, visual, tokens):
        """Mean next-token cross-entropy of the texts."""
        embeds = torch.cat([visual, self.lm.transformer.wte(tokens).to(visual.dtype)], dim=1)
        hidden = self.lm.transformer(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = self.lm.lm_head(hidden[:, visual.shape[1] - 1 : -1])
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def clipcap_step(case, size, device: torch.device, dtype: torch.dtype, compiled: bool) -> Step:
    """PyTorch's step of the same stage, batch and shapes, on random values."""
    batch, queues, stage = case.arguments[3], case.arguments[4], case.stage
    name = next(n for n in ("ie", "st", "lm", "base") if n in stage.losses)
    rng = np.random.default_rng(0)
    inputs = []
    if name == "base":  # CLIP's own image feature
        inputs.append(torch.randn(stage.batch, 1, size.visual.joint, device=device, dtype=dtype))
    if name == "st":
        inputs.append(torch.randn(batch.features.shape, device=device, dtype=dtype))
    if name == "ie":
        inputs.append(torch.from_numpy(rng.integers(0, 256, batch.image.shape, np.uint8)).to(device))
    if name != "st":
        inputs.append(torch.from_numpy(rng.integers(0, size.lm.vocab, batch.tokens.shape)).to(device))
    for queue in queues.values():
        keys = torch.randn(queue.keys.shape, device=device, dtype=dtype)
        inputs += [functional.normalize(keys, dim=1), torch.arange(stage.batch, device=device) % len(keys)]
    model = ClipCap(name, size, case.vlm.lm.config.dropout).to(device).train()
    if name == "ie":
        model.visual.whole.to(dtype)
    return Step(model, tuple(inputs), dtype, compiled)
