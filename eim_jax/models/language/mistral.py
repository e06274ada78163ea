"""Mistral: a LLaMA whose layers see a sliding window."""

from eim_jax.models.language.family import Family
from eim_jax.models.language.llama import Llama
from eim_jax.models.language.llama_files import IGNORED, QUANTISED, key_rows, read_shape, read_window, write_shape

MISTRAL_FAMILY = Family(
    model_type="mistral",
    title="Mistral",
    build=Llama,
    read=lambda theirs: read_shape(theirs, model_type="mistral", window=read_window(theirs)[0]),
    write=lambda c: write_shape(c, "MistralForCausalLM", sliding_window=c.window or None),
    rows=key_rows,
    ignored=IGNORED,
    quantised=QUANTISED,
    takes_adapters=True,
)
