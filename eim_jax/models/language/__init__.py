"""The decoder language models: one file a family, with its modules and its `Family` record, and the table of them.

A family is added by writing its file and one line in `FAMILIES`; from outside the package,
`FAMILIES["mine"] = Family(...)` does the same.
"""

from eim_jax.models.language.family import DecoderConfig, DecoderLM, Family
from eim_jax.models.language.gemma2 import GEMMA2_FAMILY
from eim_jax.models.language.gemma3 import GEMMA3_FAMILY
from eim_jax.models.language.gpt2 import GPT2_FAMILY
from eim_jax.models.language.llama_family import LLAMA_FAMILY
from eim_jax.models.language.mistral import MISTRAL_FAMILY
from eim_jax.models.language.phi3 import PHI3_FAMILY
from eim_jax.models.language.qwen import QWEN2_FAMILY, QWEN3_FAMILY
from eim_jax.models.language.smollm3 import SMOLLM3_FAMILY

__all__ = ["FAMILIES", "DecoderConfig", "DecoderLM", "Family", "family_of"]

# model_type of a config.json -> the family that reads it.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        GPT2_FAMILY,
        LLAMA_FAMILY,
        MISTRAL_FAMILY,
        QWEN2_FAMILY,
        QWEN3_FAMILY,
        SMOLLM3_FAMILY,
        GEMMA2_FAMILY,
        GEMMA3_FAMILY,
        PHI3_FAMILY,
    )
}


def family_of(config: DecoderConfig) -> Family:
    """Returns the family of a language model's shape.

    >>> from eim_jax.models.language.gpt2 import GPT2Config
    >>> family_of(GPT2Config()).title
    'GPT-2'
    """
    return FAMILIES[config.model_type]
