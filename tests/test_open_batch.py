"""Texts that enter an open batch one after the other, each with its own settings, say what they say alone."""

import jax
import numpy as np
from test_continuous import LONGEST, rows_of
from test_continuous import world as world  # the fixture
from test_decode import EOS, logit_size, visual

from eim_jax.generation.open_batch import OpenBatch, RowSettings
from eim_jax.generation.sampler import DecodeConfig, continue_text

MOST = 12
SETTINGS = [(0.0, 1.0, MOST, 0), (0.7, 0.9, MOST, 3), (0.0, 1.0, 4, 0), (1.3, 0.5, MOST, 11), (0.7, 0.9, 5, 4)]


def alone(world, row, temperature, top_p, most, seed):
    """(tokens, mean log-probability) of a text by the sampler that decodes one list by one setting."""
    lm, params, read = world
    method = "nucleus" if temperature else "greedy"
    config = DecodeConfig(method, max_tokens=MOST, top_p=top_p, temperature=temperature or 1.0, seed=seed)
    said = continue_text(lm, params, rows_of(read, np.array([row]), LONGEST), config, eos_id=EOS)
    return said.tokens[0, : int(said.length[0])].tolist()[:most], said.logprob[0], int(said.length[0]) < most


def test_texts_that_come_and_go_say_what_they_say_alone(world):
    lm, params, read = world
    batch = OpenBatch(lm, params, rows=3, prefix=LONGEST, most=MOST, ends=(EOS,))
    waiting, owner, found = list(range(10)), {}, {}
    while waiting or owner:
        free = [place for place in range(3) if place not in owner]
        coming = [waiting.pop(0) for _ in free[: len(waiting)]]
        if coming:
            padded = np.array([*coming, *[coming[-1]] * (3 - len(coming))])
            settings = RowSettings(*(np.array(a) for a in zip(*(SETTINGS[row % 5] for row in padded), strict=True)))
            settings = jax.tree.map(lambda a: a.astype(np.float32 if a.dtype.kind == "f" else np.int32), settings)
            batch.admit(rows_of(read, padded, LONGEST), free[: len(coming)], settings)
            owner |= dict(zip(free, coming, strict=False))
        said = batch.run(2)
        for place in [place for place in owner if said.done[place]]:
            found[owner.pop(place)] = [field[place] for field in said]
    for row, (tokens, logprobs, length, _) in found.items():
        words, mean, whole = alone(world, row, *SETTINGS[row % 5])
        assert [t for t in tokens[:length].tolist() if t != EOS] == words
        if whole:  # not cut by the row's own limit
            assert abs(logprobs[:length].mean() - mean) < 1e-4 * logit_size(lm, params, visual(1))
    assert len(found) == 10 and {int(length) for _, _, length, _ in found.values()} > {4}


def test_a_place_whose_text_nobody_wants_is_free_at_once(world):
    lm, params, read = world
    batch = OpenBatch(lm, params, rows=2, prefix=LONGEST, most=MOST, ends=())
    both = RowSettings(
        np.zeros(2, np.float32), np.ones(2, np.float32), np.full(2, MOST, np.int32), np.zeros(2, np.int32)
    )
    batch.admit(rows_of(read, np.arange(2), LONGEST), [0, 1], both)
    said = batch.run(1, leaving=[1])
    assert said.done.tolist() == [False, True] and said.length.tolist() == [2, 1]
