"""LaVIN-EIM's training steps in PyTorch: transformers' LLaMA and CLIP, router adapters on their attention's input.

Frozen weights lie in the compute dtype. Every block is checkpointed where the case recomputes, and compiled by itself
(one compilation serves all of them). Attention is causal without a mask for hidden markers, which PyTorch's flash
attention would not take.
"""

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch_steps import Step, queue_loss


class Adapted(nn.Module):
    """A norm and, behind it, z + sum_k w_k (B_k u + b_k); w by the row's modality, or by its own first token."""

    def __init__(self, norm: nn.Module, width: int, router, modality: nn.Parameter | None):
        super().__init__()
        self.norm, self.temperature, self.rate = norm, router.temperature, router.dropout
        rank, groups = router.rank, router.groups
        self.router, self.down = nn.Linear(width, 2), nn.Linear(width, rank)
        self.up = nn.Parameter(torch.zeros(2, groups, rank // groups, width // groups))
        self.bias = nn.Parameter(torch.zeros(2, width))
        self.modality = [modality]  # in a list: the tower owns it
        self.has_image = None

    def forward(self, x):  # noqa: D102
        z = self.norm(x)
        first = z[:, 0] if self.modality[0] is None else self.modality[0][self.has_image]
        w = torch.softmax(self.router(first).float() / self.temperature, dim=-1).to(z.dtype)
        u = functional.dropout(self.down(z), self.rate, self.training)
        inner = (u[:, :, None] * w[:, None, :, None]).unflatten(-1, self.up.shape[1:3])
        out = torch.einsum("btkgi,kgio->btgo", inner, self.up.to(z.dtype)).flatten(-2)
        return z + out.to(z.dtype) + (w @ self.bias.to(z.dtype))[:, None]


class Lavin(nn.Module):
    """Stage st, lm, adapter or ie; forward returns the stage's loss.

    Inputs by stage: st (features, keys, index), lm (tokens, keys, index), adapter (features, before, tokens, targets),
    ie (images, before, tokens, targets, keys, index); `before` are BOS and the markers, targets -100 where nothing is
    supervised.
    """

    def __init__(self, stage: str, case, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.stage, (v, c, st) = stage, (case.vlm.visual.config, case.vlm.lm.config, case.vlm.st.config)
        if stage != "lm":
            self.st = nn.Sequential(
                nn.Linear(v.width, st.hidden_width), nn.SiLU(), nn.Linear(st.hidden_width, c.width)
            ).to(device)
        if stage == "ie":
            shape = {"hidden_size": v.width, "intermediate_size": v.mlp, "num_hidden_layers": v.layers}
            shape |= {"num_attention_heads": v.heads, "image_size": v.image_size, "patch_size": v.patch_size}
            config = transformers.CLIPVisionConfig(**shape, projection_dim=v.joint)
            self.visual = _frozen(lambda: transformers.CLIPVisionModelWithProjection(config), device, dtype)
            self.tower = [getattr(self.visual.vision_model, "vision_model", self.visual.vision_model)]
            for layer in self.tower[0].encoder.layers:
                layer.layer_norm1 = Adapted(layer.layer_norm1, v.width, v.adapter, None).to(device)
            self.visual.train()
        if stage != "st":
            shape = {"vocab_size": c.vocab, "hidden_size": c.width, "intermediate_size": c.mlp}
            shape |= {"num_hidden_layers": c.layers, "num_attention_heads": c.heads}
            shape |= {"num_key_value_heads": c.kv_heads or c.heads, "tie_word_embeddings": c.tied}
            config = transformers.LlamaConfig(**shape, attn_implementation="sdpa")
            self.lm = _frozen(lambda: transformers.LlamaForCausalLM(config), device, dtype)
            self.modality = nn.Parameter(torch.randn(2, c.width, device=device))
            for layer in self.lm.model.layers:
                adapted = Adapted(layer.input_layernorm, c.width, c.adapter, self.modality).to(device)
                adapted.has_image = torch.arange(case.stage.batch, device=device) % 2
                layer.input_layernorm = adapted
            if c.remat != "none":  # the first name is that of transformers from 5.20 on, the second goes away with 6
                checkpoint = getattr(self.lm, "activation_checkpointing_enable", None)
                (checkpoint or self.lm.gradient_checkpointing_enable)({"use_reentrant": False})
            self.lm.train()

    def compile_blocks(self) -> None:
        """Compiles every block of the LM."""
        for layer in self.lm.model.layers if self.stage != "st" else []:
            layer.compile(dynamic=False)

    def forward(self, *inputs):  # noqa: D102
        if self.stage == "st":
            features, keys, index = inputs
            return queue_loss(self.st(features).float().mean(1), keys, index)
        if self.stage == "lm":
            tokens, keys, index = inputs
            return queue_loss(self.read(self.lm.model.embed_tokens(tokens))[:, -1], keys, index)
        if self.stage == "adapter":
            features, *text = inputs
            return self.respond(self.st(features), *text)
        images, *text, keys, index = inputs
        seen = self.see(images)
        cls = self.visual.visual_projection(self.tower[0].post_layernorm(seen[:, 0]))
        side = round((seen.shape[1] - 1) ** 0.5)
        patches = seen[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
        pooled = functional.adaptive_avg_pool2d(patches, min(side, 7)).flatten(2).transpose(1, 2)
        visual = self.st(torch.cat([seen[:, :1], pooled], dim=1))
        return self.respond(visual, *text) + queue_loss(cls, keys, index)

    def see(self, images):
        """[CLS] and all patches."""
        tower = self.tower[0]
        x = tower.pre_layrnorm(tower.embeddings(images.permute(0, 3, 1, 2) / 127.5 - 1.0))
        for layer in tower.encoder.layers:
            out = torch.utils.checkpoint.checkpoint(layer, x, None, use_reentrant=False)
            x = out[0] if isinstance(out, tuple) else out
        return x

    def read(self, embeds):
        """LM_block's output; embeddings ask for a gradient, which checkpoints without other inputs need."""
        embeds = embeds if embeds.requires_grad else embeds.detach().requires_grad_()
        return self.lm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def respond(self, visual, before, tokens, targets):
        """Mean cross-entropy of the supervised tokens."""
        embed = self.lm.model.embed_tokens
        hidden = self.read(torch.cat([embed(before), visual.to(embed.weight.dtype), embed(tokens)], dim=1))
        logits = self.lm.lm_head(hidden[:, -1 - tokens.shape[1] : -1])
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


def _frozen(make, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model that is drawn on the device in its dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def lavin_step(case, stage: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> Step:
    """PyTorch's step of the same stage, batch and shapes, on random values."""
    batch, queues, c, rows = case.arguments[3], case.arguments[4], case.vlm.lm.config, case.stage.batch
    rng, inputs = np.random.default_rng(0), []
    if batch.features is not None:
        inputs.append(torch.randn(batch.features.shape, device=device, dtype=dtype))
    if batch.image is not None:
        inputs.append(torch.from_numpy(rng.integers(0, 256, batch.image.shape, np.uint8)).to(device))
    if batch.tokens is not None:
        tokens = torch.from_numpy(rng.integers(0, c.vocab, batch.tokens.shape)).to(device)
        if batch.supervised is not None:
            marks = 1 + len(case.vlm.with_image)
            inputs.append(torch.ones(rows, marks, dtype=torch.long, device=device))
        inputs.append(tokens)
    if batch.supervised is not None:
        half = torch.arange(tokens.shape[1], device=device) >= tokens.shape[1] // 2
        inputs.append(torch.where(half, tokens, -100))
    for queue in queues.values():
        keys = torch.randn(queue.keys.shape, device=device, dtype=dtype)
        inputs += [functional.normalize(keys, dim=1), torch.arange(rows, device=device) % len(keys)]
    model = Lavin(stage, case, device, dtype)
    if compiled:
        model.compile_blocks()
    return Step(model, tuple(inputs), dtype, compiled=False)
