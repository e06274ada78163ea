"""Decoding against a plain reimplementation that runs the whole model anew for every token, without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, size_of
from tiny import loud

from eim_jax.generation import beam, decode_state, sampler
from eim_jax.generation.sampler import DecodeConfig, generate
from eim_jax.models.language.gpt2 import GPT2, GPT2Config
from eim_jax.parallel.sharding import batch_sharding, make_mesh

VOCAB, WIDTH, EOS, PERIOD, LONGEST = 23, 16, 3, 5, 10


def tiny(scan=False, seed=0):
    """A tiny GPT-2 whose next-token distributions are peaked enough to differ and flat enough to search."""
    lm = GPT2(GPT2Config(vocab=VOCAB, context=64, width=WIDTH, layers=2, heads=2, scan=scan))
    params = loud(lm.init, jnp.zeros((1, 2), jnp.int32), size=0.02, seed=seed)
    params = jax.tree.map(lambda x: 8 * x, params)
    louder = jnp.ones((VOCAB, 1)).at[jnp.array([EOS, PERIOD])].set(2.0)  # so that texts end now and then
    params["token_embedding"]["embedding"] *= louder
    return lm, params


def visual(rows=4, tokens=3, seed=1):
    return 0.5 * jax.random.normal(jax.random.key(seed), (rows, tokens, WIDTH))


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(lm, params, prefix, tokens, count):
    """Logits after [prefix ; the first `count` tokens] by one full forward pass; causal, so later tokens are unseen."""
    text = lm.apply({"params": params}, tokens[None], method="embed")
    hidden, _ = lm.apply({"params": params}, jnp.concatenate([prefix[None], text], axis=1), method="hidden")
    return lm.apply({"params": params}, hidden, method="logits")[0, prefix.shape[0] - 1 + count]


def logit_size(lm, params, prefix):
    """The largest |logit| of a first token. A log-probability is a logit less their logsumexp: that is its rounding."""
    nothing = np.zeros(LONGEST, np.int32)
    return size_of(*(plain_logits(lm, params, row, nothing, 0) for row in prefix))


def plain_logprobs(lm, params, prefix, tokens):
    """float64 log-probabilities of the token after [prefix ; tokens]."""
    padded = np.zeros(LONGEST, np.int32)
    padded[: len(tokens)] = tokens
    logits = np.asarray(plain_logits(lm, params, prefix, padded, len(tokens)), np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def plain_greedy(lm, params, prefix, max_tokens, stops):
    tokens, total = [], 0.0
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in stops):
        logprobs = plain_logprobs(lm, params, prefix, tokens)
        tokens.append(int(logprobs.argmax()))
        total += logprobs.max()
    return tokens, total / len(tokens)


def clipcap_beam(lm, params, prefix, max_tokens, stops, beams):
    """ClipCap's generate_beam, line by line, in float64 and with lists."""
    first = plain_logprobs(lm, params, prefix, [])
    order = np.argsort(-first)[:beams]
    tokens, scores = [[int(t)] for t in order], first[order]
    lengths, stopped = np.ones(beams), np.array([int(t) in stops for t in order])
    for _ in range(max_tokens - 1):
        if stopped.all():
            break
        logprobs = np.stack([plain_logprobs(lm, params, prefix, t) for t in tokens])
        logprobs[stopped] = -np.inf
        logprobs[stopped, 0] = 0
        sums = scores[:, None] + logprobs
        lengths[~stopped] += 1
        means = (sums / lengths[:, None]).reshape(-1)
        order = np.argsort(-means)[:beams]
        source, token = order // VOCAB, order % VOCAB
        lengths, stopped = lengths[source], stopped[source]
        tokens = [tokens[s] + [int(t)] for s, t in zip(source, token, strict=True)]
        scores = means[order] * lengths
        stopped = stopped | np.isin(token, stops)
    means = scores / lengths
    winner = int(np.argmax(means))
    return tokens[winner][: int(lengths[winner])], means[winner]


def check(decoded, row, size, tokens, logprob):
    kept = tokens[:-1] if tokens[-1] == EOS else tokens
    assert int(decoded.length[row]) == len(kept)
    assert decoded.tokens[row].tolist() == kept + [0] * (decoded.tokens.shape[1] - len(kept))
    assert_close(decoded.logprob[row], logprob, size=size)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("stop_at_period", [False, True])
def test_greedy_equals_the_full_forward_loop(scan, stop_at_period):
    lm, params = tiny(scan)
    prefix = visual(rows=4)
    config = DecodeConfig("greedy", max_tokens=9, stop_at_period=stop_at_period)
    decoded = generate(lm, params, prefix, None, None, config, eos_id=EOS, period_id=PERIOD)
    stops = (EOS, PERIOD) if stop_at_period else (EOS,)
    size = logit_size(lm, params, prefix)
    for row in range(4):
        check(decoded, row, size, *plain_greedy(lm, params, prefix[row], 9, stops))


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_equals_clipcaps_search(beams, seed):
    lm, params = tiny(seed=seed)
    prefix = visual(rows=6, seed=seed + 10)
    config = DecodeConfig("beam", beams=beams, max_tokens=8, stop_at_period=True)
    decoded = generate(lm, params, prefix, None, None, config, eos_id=EOS, period_id=PERIOD)
    size = logit_size(lm, params, prefix)
    for row in range(6):
        check(decoded, row, size, *clipcap_beam(lm, params, prefix[row], 8, (EOS, PERIOD), beams))


def test_beam_with_scanned_layers_equals_clipcaps_search():
    lm, params = tiny(scan=True)
    prefix = visual(rows=3)
    decoded = generate(lm, params, prefix, None, None, DecodeConfig("beam", beams=4, max_tokens=6), eos_id=EOS)
    size = logit_size(lm, params, prefix)
    for row in range(3):
        check(decoded, row, size, *clipcap_beam(lm, params, prefix[row], 6, (EOS,), 4))


def test_the_searches_see_finished_and_unfinished_winners():
    """Guards the two tests above: both endings must occur in them."""
    lm, params = tiny()
    lengths = [len(clipcap_beam(lm, params, p, 8, (EOS, PERIOD), 5)[0]) for p in visual(rows=6, seed=10)]
    assert min(lengths) < 8 and max(lengths) == 8


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_prompts_of_different_lengths_decode_as_one_by_one(method):
    lm, params = tiny()
    prefix, lengths = visual(), [4, 1, 3, 0]
    prompt = jax.random.randint(jax.random.key(2), (4, 4), 0, VOCAB)
    valid = jnp.arange(4)[None] < jnp.array(lengths)[:, None]
    config = DecodeConfig(method, beams=3, max_tokens=7)
    together = generate(lm, params, prefix, prompt, valid, config, eos_id=EOS, index=jnp.arange(4) + 40)
    size = logit_size(lm, params, prefix)
    for row, length in enumerate(lengths):
        own = prompt[row : row + 1, :length] if length else None
        index = jnp.array([40 + row])
        alone = generate(lm, params, prefix[row : row + 1], own, None, config, eos_id=EOS, index=index)
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()
        assert_close(together.logprob[row], alone.logprob[0], size=size)


def test_a_row_without_image_decodes_as_text_alone():
    lm, params = tiny()
    prompt = jax.random.randint(jax.random.key(2), (2, 4), 0, VOCAB)
    config = DecodeConfig(max_tokens=6)
    mixed = generate(lm, params, visual(2), prompt, None, config, eos_id=EOS, has_image=jnp.array([True, False]))
    alone = generate(lm, params, None, prompt, None, config, eos_id=EOS)
    seen = generate(lm, params, visual(2), prompt, None, config, eos_id=EOS)
    assert mixed.tokens[0].tolist() == seen.tokens[0].tolist()
    assert mixed.tokens[1].tolist() == alone.tokens[1].tolist()


def test_texts_that_end_do_not_depend_on_max_tokens():
    lm, params = tiny()
    prefix = visual(rows=16)
    options = {"eos_id": EOS, "period_id": PERIOD}
    short, long = (
        generate(lm, params, prefix, None, None, DecodeConfig(max_tokens=n, stop_at_period=True), **options)
        for n in (6, 20)
    )
    ended = np.flatnonzero(np.asarray(short.length) < 6)
    assert 0 < len(ended) < 16
    assert short.tokens[ended].tolist() == long.tokens[ended, :6].tolist()
    assert not long.tokens[ended, 6:].any()
    assert_close(short.logprob[ended], long.logprob[ended], size=logit_size(lm, params, prefix))


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_decoding_stops_when_all_rows_have_ended(method, monkeypatch):
    steps = []
    module = beam if method == "beam" else sampler
    loop = module.loop

    def watched(step, state, max_tokens):
        def counted(s):
            jax.debug.callback(lambda: steps.append(1))
            return step(s)

        return loop(counted, state, max_tokens)

    monkeypatch.setattr(module, "loop", watched)
    lm, params = tiny()
    prefix = visual(rows=1)
    free = generate(lm, params, prefix, None, None, DecodeConfig(method, beams=1, max_tokens=9), eos_id=None)
    jax.effects_barrier()
    assert len(steps) == 8
    steps.clear()
    stop = int(free.tokens[0, 3])
    first = free.tokens[0].tolist().index(stop)
    ended = generate(lm, params, prefix, None, None, DecodeConfig(method, beams=1, max_tokens=9), eos_id=stop)
    jax.effects_barrier()
    assert len(steps) == first == int(ended.length[0])


def test_eos_is_dropped_and_the_period_is_kept():
    lm, params = tiny()
    prefix = visual(rows=1)
    free = generate(lm, params, prefix, None, None, DecodeConfig(max_tokens=4), eos_id=None)
    assert int(free.length[0]) == 4
    third = int(free.tokens[0, 2])
    at = free.tokens[0].tolist().index(third)
    eos = generate(lm, params, prefix, None, None, DecodeConfig(max_tokens=4), eos_id=third)
    assert eos.tokens[0].tolist() == free.tokens[0, :at].tolist() + [0] * (4 - at)
    config = DecodeConfig(max_tokens=4, stop_at_period=True)
    period = generate(lm, params, prefix, None, None, config, eos_id=None, period_id=third)
    assert period.tokens[0].tolist() == free.tokens[0, : at + 1].tolist() + [0] * (3 - at)


def test_nucleus_samples_follow_the_exact_distribution():
    lm, params = tiny()
    rows, top_p, temperature = 20_000, 0.8, 6.0
    prefix = jnp.broadcast_to(visual(rows=1), (rows, 3, WIDTH))
    config = DecodeConfig("nucleus", max_tokens=1, top_p=top_p, temperature=temperature, seed=7)
    decoded = generate(lm, params, prefix, None, None, config, eos_id=None)
    logprobs = plain_logprobs(lm, params, prefix[0], [])
    p = np.exp(logprobs / temperature) / np.exp(logprobs / temperature).sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    assert 2 < len(kept) < VOCAB
    exact = np.zeros(VOCAB)
    exact[kept] = p[kept] / p[kept].sum()
    counts = np.bincount(np.asarray(decoded.tokens[:, 0]), minlength=VOCAB)
    assert counts[exact == 0].sum() == 0
    chi_square = (((counts - rows * exact) ** 2)[kept] / (rows * exact[kept])).sum()
    freedom = len(kept) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations
    expected = logprobs[np.asarray(decoded.tokens[:, 0])]
    assert_close(decoded.logprob, expected, size=logit_size(lm, params, prefix[:1]))


def test_nucleus_of_no_mass_is_greedy():
    lm, params = tiny()
    greedy = generate(lm, params, visual(), None, None, DecodeConfig(max_tokens=8), eos_id=EOS)
    nucleus = generate(lm, params, visual(), None, None, DecodeConfig("nucleus", max_tokens=8, top_p=0.0), eos_id=EOS)
    assert nucleus.tokens.tolist() == greedy.tokens.tolist()


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_mass():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    for top_p, kept in ((0.0, [1]), (0.39, [1]), (0.5, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert np.flatnonzero(np.isfinite(decode_state.nucleus(logits, top_p, 1.0)[0])).tolist() == kept, top_p


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_batch_sharded_inputs_decode_the_same(method):
    lm, params = tiny()
    prefix = visual(rows=8)
    config = DecodeConfig(method, beams=3, max_tokens=5)
    expected = generate(lm, params, prefix, None, None, config, eos_id=EOS)
    mesh = make_mesh((1, -1, 1))
    sharded = jax.device_put(prefix, batch_sharding(mesh))
    found = generate(lm, params, sharded, None, None, config, eos_id=EOS)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert_close(found.logprob, expected.logprob, size=logit_size(lm, params, prefix))


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_one_token_is_enough(method):
    lm, params = tiny()
    decoded = generate(lm, params, visual(), None, None, DecodeConfig(method, max_tokens=1), eos_id=None)
    assert decoded.tokens.shape == (4, 1) and decoded.length.tolist() == [1] * 4


def test_what_cannot_be_decoded_is_an_error():
    lm, params = tiny()
    with pytest.raises(ValueError, match="nothing to continue"):
        generate(lm, params, None, None, None, DecodeConfig(), eos_id=EOS)
    with pytest.raises(ValueError, match="period_id"):
        generate(lm, params, visual(), None, None, DecodeConfig(stop_at_period=True), eos_id=EOS)
    with pytest.raises(ValueError, match="context of 64"):
        generate(lm, params, visual(), None, None, DecodeConfig(max_tokens=62), eos_id=EOS)
    with pytest.raises(ValueError, match="method"):
        DecodeConfig("best")
    with pytest.raises(ValueError, match="top_p"):
        DecodeConfig(top_p=1.5)
