"""The same steps of LLaMA-like models in PyTorch: transformers' LLaMA, LoRA and LLaMA-Adapter's prompts by PEFT."""

import peft
import torch
import transformers
from llama_case import LORA, PROMPTS
from torch import nn
from torch.nn import functional
from torch_steps import Step

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Captioner(nn.Module):
    """ST and LLaMA: loss_base of texts behind visual tokens, or (llama_adapter) behind none.

    PEFT's prompts take no visual tokens, so that its side of llama_adapter has no ST: it computes a little less.
    """

    def __init__(self, kind: str, case, dtype: torch.dtype):
        super().__init__()
        c, st = case.vlm.lm.config, case.vlm.st.config
        shape = {"vocab_size": c.vocab, "hidden_size": c.width, "intermediate_size": c.mlp}
        shape |= {"num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads}
        config = transformers.LlamaConfig(**shape, tie_word_embeddings=c.tied, attn_implementation="sdpa")
        self.lm = transformers.LlamaForCausalLM(config).to(dtype)
        self.st = None
        if kind == "lora":
            peft.get_peft_model(self.lm, peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=TARGETS))
        elif kind == "llama_adapter":
            prompts = {"adapter_len": PROMPTS, "adapter_layers": c.layers, "task_type": "CAUSAL_LM"}
            peft.get_peft_model(self.lm, peft.AdaptionPromptConfig(**prompts))
        if kind != "llama_adapter":
            self.st = nn.Sequential(
                nn.Linear(st.width_in, st.hidden_width), nn.SiLU(), nn.Linear(st.hidden_width, c.width)
            )
        self.lm.train()

    def forward(self, features, tokens):  # noqa: D102
        embeds = self.lm.get_input_embeddings()(tokens)
        start = 0
        if self.st is not None:
            visual = self.st(features)
            embeds, start = torch.cat([visual, embeds], dim=1), visual.shape[1]
        hidden = self.lm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        if start:
            hidden, targets = hidden[:, start - 1 : -1], tokens
        else:
            hidden, targets = hidden[:, :-1], tokens[:, 1:]
        logits = self.lm.lm_head(hidden)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def llama_step(case, kind: str, dtype: torch.dtype) -> Step:
    """PyTorch's step of the same kind, batch and shapes on the CPU, on random values."""
    batch, c = case.arguments[3], case.vlm.lm.config
    features = torch.randn(batch.features.shape)
    tokens = torch.randint(0, c.vocab, batch.tokens.shape)
    return Step(Captioner(kind, case, dtype), (features, tokens), dtype, compiled=False, lr=1e-4)
