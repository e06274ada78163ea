"""LLaMA 1, Llama 2, Llama 3 and what calls itself a llama (TinyLlama, SmolLM2, Vicuna)."""

from typing import Any

from eim_jax.models.language.llama_block import LlamaConfig
from eim_jax.models.language.llama_files import llama_like, read_shape, write_shape
from eim_jax.models.language.llama_meta import META


class LlamaWords:
    """What a plan needs of LLaMA's tokenizer where it is not at hand: BOS, and how many tokens LaVIN's markers have."""

    bos_token_id = 1

    def __call__(self, words: str, add_special_tokens: bool = True) -> dict[str, Any]:
        """Returns {"input_ids": ...} of one of the two markers, or of BOS and one token."""
        markers = {"Image: ": [7084, 29901, 29871], "Image: N/A": [7084, 29901, 405, 29914, 29909]}
        return {"input_ids": [*[1] * add_special_tokens, *markers.get(words, [263])]}


LLAMA_FAMILY = llama_like(
    "llama",
    "LLaMA",
    read=read_shape,
    write=lambda c: write_shape(c, "LlamaForCausalLM", bos_token_id=1, eos_token_id=2),
    published={
        "huggyllama/llama-7b": LlamaConfig(),
        "huggyllama/llama-13b": LlamaConfig(width=5120, layers=40, heads=40, mlp=13824),
        "lmsys/vicuna-7b-v1.5": LlamaConfig(context=4096, eps=1e-5),
    },
    plan_tokenizer=LlamaWords(),
    shards=META,
)
