"""A real pretrained LLaMA (stories260K: 5 layers, grouped-query attention) against llama2.c's own logits and text."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from flax.traverse_util import unflatten_dict

from eim_jax.data.tokenize import load_tokenizer
from eim_jax.generation.sampler import DecodeConfig, generate
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.pretrained import LM, export_lm, load_lm

BOS = 1


def read_llama2c(path: pathlib.Path) -> LM:
    """A legacy llama2.c file: 7 int32, then float32 tensors, matrices [out, in], RoPE over adjacent pairs."""
    with path.open("rb") as file:
        width, mlp, layers, heads, kv_heads, vocab, context = np.fromfile(file, np.int32, 7).tolist()
        rest = np.fromfile(file, np.float32)

    def take(*shape: int) -> np.ndarray:
        nonlocal rest
        size = int(np.prod(shape))
        tensor, rest = rest[:size].reshape(shape), rest[size:]
        return tensor

    e = width // heads
    halves = lambda w: w.reshape(layers, -1, e // 2, 2, width).swapaxes(2, 3).reshape(w.shape)  # noqa: E731
    flat = {"token_embedding/embedding": take(vocab, width), "blocks/norm_1/scale": take(layers, width)}
    flat["blocks/attn/q/kernel"] = halves(take(layers, heads * e, width))
    flat["blocks/attn/k/kernel"] = halves(take(layers, kv_heads * e, width))
    flat["blocks/attn/v/kernel"] = take(layers, kv_heads * e, width)
    flat["blocks/attn/out/kernel"] = take(layers, width, heads * e)
    flat["blocks/norm_2/scale"] = take(layers, width)
    flat["blocks/mlp/gate/kernel"] = take(layers, mlp, width)
    flat["blocks/mlp/down/kernel"] = take(layers, width, mlp)
    flat["blocks/mlp/up/kernel"] = take(layers, mlp, width)
    flat["norm_f/scale"] = take(width)
    assert rest.size == context * e  # tables of cos and sin, and no head: it is tied
    flat = {path: jnp.asarray(x.swapaxes(-1, -2) if "kernel" in path else x) for path, x in flat.items()}
    shape = {"vocab": vocab, "context": context, "width": width, "layers": layers, "heads": heads, "mlp": mlp}
    config = LlamaConfig(**shape, kv_heads=kv_heads, eps=1e-5, tied=True, scan=True)
    return LM(config, unflatten_dict(flat, sep="/"))


@pytest.fixture
def stories(shared_data) -> pathlib.Path:
    return shared_data("llama_stories260K")


@pytest.fixture
def exported(stories, shared_data, tmp_path) -> pathlib.Path:
    """A Hugging Face directory of it, with its SentencePiece tokenizer as LLaMA's directories hold theirs."""
    export_lm(tmp_path, read_llama2c(stories / "stories260K.bin"))
    shutil.copy(shared_data("tokenizers") / "tok512" / "tok512.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return tmp_path


@pytest.mark.parametrize("scan", [False, True])
def test_logits_of_64_steps_equal_llama2c_after_a_round_trip_through_hugging_faces_format(stories, exported, scan):
    golden, lm = np.load(stories / "golden_logits.npz"), load_lm(exported, scan=scan)
    tokens = jnp.asarray(golden["tokens"][None], jnp.int32)
    found = jax.jit(Llama(lm.config).apply)({"params": lm.params}, tokens)[0]
    assert_close(found, golden["logits"], 1e-4)


def test_greedy_text_equals_llama2c_word_for_word(stories, exported):
    lm, tokenizer = load_lm(exported, scan=True), load_tokenizer(exported)
    settings = DecodeConfig("greedy", max_tokens=256)
    prompt = jnp.array([[BOS]], jnp.int32)
    decoded = generate(Llama(lm.config), lm.params, None, prompt, None, settings, eos_id=tokenizer.eos_token_id)
    text = tokenizer.decode(np.asarray(decoded.tokens)[0, : int(decoded.length[0])])
    assert text.strip() == (stories / "golden_greedy_256.txt").read_text().strip()


def test_a_sentencepiece_directory_gives_sentencepieces_own_ids(exported):
    sentencepiece = pytest.importorskip("sentencepiece")
    own, tokenizer = sentencepiece.SentencePieceProcessor(str(exported / "tokenizer.model")), load_tokenizer(exported)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (own.bos_id(), own.eos_id(), len(own))
    # No double spaces: this file, unlike LLaMA's own, says that they are one, which transformers does not read.
    for text in ("Once upon a time", "Response:", "a\n\nb", "naïve 日本", 'Lily said, "Let\'s go!"'):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == own.encode(text), text
