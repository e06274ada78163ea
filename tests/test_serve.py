"""A served run answers OpenAI's own client with what the library says, whoever else asks."""

import base64
import concurrent.futures
import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import config_of

openai = pytest.importorskip("openai", reason="the extra test brings OpenAI's client")
pytest.importorskip("uvicorn", reason="--mode=serve needs the extra serve")

from served import World, asked, client_of, post  # noqa: E402
from served import address as address  # noqa: E402 fixtures
from served import client as client  # noqa: E402
from served import world as world  # noqa: E402

from eim_jax import api  # noqa: E402
from eim_jax.losses.queue_files import StaleQueue  # noqa: E402
from eim_jax.serving.errors import RequestError  # noqa: E402
from eim_jax.serving.nearest_keys import NearestKeys  # noqa: E402
from eim_jax.serving.text_stream import TextStream  # noqa: E402
from eim_jax.training.setup import Inputs  # noqa: E402

MANY = 32


def test_many_at_once_are_told_what_the_library_says_of_each_picture_and_arm(world, client):
    assert [model.id for model in client.models.list()] == ["baseline", "eim"]
    said = {arm: run.caption(world.pictures) for arm, run in world.runs.items()}
    assert said["baseline"] != said["eim"]
    wanted = [(arm, row) for row in range(4) for arm in said] * (MANY // 8)

    def ask(one):
        arm, row = one
        return client.chat.completions.create(model=arm, messages=asked(world.pictures[row]))

    with concurrent.futures.ThreadPoolExecutor(MANY) as pool:
        answers = list(pool.map(ask, wanted))
    assert [found.choices[0].message.content for found in answers] == [said[arm][row] for arm, row in wanted]
    assert len({found.id for found in answers}) == MANY
    for (arm, _), found in zip(wanted, answers, strict=True):
        usage = found.usage
        assert usage.prompt_tokens == world.engine.arms[arm].prefix  # the picture's tokens: GPT-2 reads no BOS
        cut = usage.completion_tokens == world.engine.arms[arm].most
        assert found.choices[0].finish_reason == ("length" if cut else "stop")


def test_pieces_of_a_stream_are_the_whole_and_a_stop_string_ends_it(world, client):
    said = {(arm, row): run.caption(world.pictures[row])[0] for arm, run in world.runs.items() for row in range(4)}
    (arm, row), whole = max(said.items(), key=lambda item: len(item[1].split()))
    question = {"model": arm, "messages": asked(world.pictures[row])}

    def stream(**options):
        chunks = list(
            client.chat.completions.create(
                **question,
                stream=True,
                stream_options={"include_usage": True},
                logprobs=True,
                **options,
            )
        )
        *pieces, end = chunks
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        logprobs = [
            t.logprob for chunk in pieces if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content
        ]
        return text, len(pieces), pieces[-1].choices[0].finish_reason, logprobs, end.usage

    text, pieces, reason, logprobs, usage = stream()
    assert text == whole and pieces > 3 and reason == ("length" if usage.completion_tokens == 8 else "stop")
    assert len(logprobs) == usage.completion_tokens and all(value < 0 for value in logprobs)
    word = whole.split()[2]
    stopped = whole[: whole.index(word)].rstrip()
    assert stream(stop=[word])[:3:2] == (stopped, "stop")
    short = client.chat.completions.create(**question, stop=word)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == (stopped, "stop")
    assert whole.startswith(stream(max_tokens=3)[0]) and stream(max_tokens=3)[4].completion_tokens == 3


def test_samples_and_beams_are_the_library_s(world, client):
    def say(**options):
        found = client.chat.completions.create(model="eim", messages=asked(world.pictures[1]), **options)
        return found.choices[0].message.content

    def library(seed=0, **fields):
        decode = dataclasses.replace(world.inputs.config.decode, **fields)
        config = dataclasses.replace(world.inputs.config, decode=decode, seed=seed)
        run = api.Run(dataclasses.replace(world.inputs, config=config), "eim")
        run.__dict__["_trained"] = world.runs["eim"]._trained
        return run.caption(world.pictures[1], method=decode.methods[0])[0]

    assert say(temperature=0.7, top_p=0.9, seed=5) == library(5, methods=("nucleus",), temperature=0.7, top_p=0.9)
    assert say(extra_body={"method": "beam"}) == library(methods=("beam",))


def test_likelihood_and_nearest_keys_are_what_the_model_s_own_functions_give(world, address):
    run, picture = world.runs["eim"], world.pictures[2]
    text, arm = "a big red ring.", world.engine.arms["eim"]
    said = post(address, "/api/likelihood", {"model": "eim", "messages": asked(picture), "text": text})[1]
    ids = jnp.array([*world.inputs.lm_tokenizer(text)["input_ids"], world.inputs.lm_tokenizer.eos_token_id])[None]
    pixels = jnp.asarray(np.asarray(picture)[None])
    seen = run.model.encode_image(run.params, pixels)
    logits = run.model.token_logits(run.params, run.model.connect(run.params, seen), ids, ids >= 0)
    logits, ids = np.asarray(logits, np.float64)[0], np.asarray(ids)
    logprob = logits[np.arange(len(ids[0])), ids[0]] - np.log(np.exp(logits).sum(1))
    eos = world.inputs.config.data.eos
    wanted = -logprob.mean() if eos else -logprob[:-1].mean()
    assert said["nll"] == pytest.approx(wanted, abs=1e-4) and said["tokens"] == len(ids[0]) - (not eos)
    losses = post(address, "/api/neighbours", {"model": "eim", "messages": asked(picture)})[1]["losses"]
    assert [loss["loss"] for loss in losses] == ["loss_IE", "loss_ST"]
    query = np.asarray(run.model.pooled(run.params, seen), np.float64)[0]
    keys = np.asarray(world.nearest._queues["caption"].keys, np.float64)[: losses[0]["rows"]]
    similar = keys @ (query / np.linalg.norm(query))
    found = [(sample["row"], sample["similarity"]) for sample in losses[0]["nearest"]]
    # Of each training picture the nearest text.
    best = {}
    for row in np.argsort(-similar, kind="stable").tolist():
        best.setdefault(world.inputs.train.samples[row].image, row)
    wanted = list(best.values())[:4]
    assert [row for row, _ in found] == wanted
    assert [value for _, value in found] == pytest.approx(similar[wanted].tolist(), abs=1e-5)
    assert losses[0]["nearest"][0]["text"] == world.inputs.train.samples[found[0][0]].response
    assert post(address, "/api/likelihood", {"model": "eim", "messages": asked(picture), "text": " "})[0] == 400
    assert arm.most == 8


def test_a_run_that_follows_instructions_is_asked_in_its_own_form(tmp_path):
    config = config_of("miniature_lavin", **{"arms": ("eim",), "data.scenes": 16, "decode.max_tokens": 4})
    world = World(dataclasses.replace(config, decode=dataclasses.replace(config.decode, batch=8)), tmp_path)
    with world.listening() as (_, address), client_of(address) as client:
        for picture in (world.pictures[0], None):
            found = client.chat.completions.create(model="eim", messages=asked(picture, "What is this?"))
            assert found.choices[0].message.content == world.runs["eim"].ask(picture, "What is this?")
        assert _by_vlmevalkit(address, world.pictures[0], "What is this?") == world.runs["eim"].ask(
            Image.open(io.BytesIO(_jpeg(world.pictures[0]))), "What is this?"
        )
        before = [*asked(words="Which?"), {"role": "assistant", "content": "a"}]
        for messages, code, words in (
            ([*before, *asked(words="Why?")], None, "single questions"),
            (before, None, "must end with a user's"),
            ([{"role": "system", "content": "Be kind."}, *asked(words="Why?")], None, "no system prompt"),
            (asked(words="why? " * 300), "context_length_exceeded", "reads at most"),
            ([*asked(world.pictures[0], "a"), *asked(world.pictures[1], "b")], None, "a second picture"),
        ):
            with pytest.raises(openai.BadRequestError, match=words) as caught:
                client.chat.completions.create(model="eim", messages=messages)
            assert caught.value.code == code
    world.engine.stop()


def _jpeg(picture):
    """As VLMEvalKit encodes a picture: enlarged to 100 pixels where it is smaller, by Pillow's JPEG."""
    picture = picture.convert("RGB")
    factor = max(100 / min(picture.size), 1)
    file = io.BytesIO()
    picture.resize((int(picture.width * factor), int(picture.height * factor))).save(file, "JPEG")
    return file.getvalue()


def _by_vlmevalkit(address, picture, words):
    """The request of VLMEvalKit's `GPT4V`, field by field (vlmeval/api/gpt.py of ms-vlmeval 0.0.20)."""
    url = "data:image/jpeg;base64," + base64.b64encode(_jpeg(picture)).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "text", "text": words},
    ]
    body = {"model": "eim", "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 2048}
    status, said = post(address, "/v1/chat/completions", body, Authorization="Bearer none")
    assert status == 200, said
    return said["choices"][0]["message"]["content"]


def test_a_text_is_sent_once_it_can_be_meant(world):
    tokenizer = world.inputs.lm_tokenizer
    for text in ("a naïve café, 猫と犬 🙂", "one\n\ntwo  three "):
        ids = tokenizer(text)["input_ids"]
        stream = TextStream(tokenizer)
        pieces = [stream.feed(ids[:count]) for count in range(1, len(ids))] + [stream.feed(ids, last=True)]
        assert "".join(pieces) == text.strip() and "\ufffd" not in "".join(pieces) and len(set(pieces)) > 3
    ids = tokenizer("one stops before the next")["input_ids"]
    stream = TextStream(tokenizer, [" before", "not there"])
    pieces = [stream.feed(ids[:count]) for count in range(1, len(ids) + 1)]
    assert "".join(pieces) == "one stops" and stream.stopped


def test_queues_of_another_device_leave_an_arm_without_nearest_keys_but_served(world, monkeypatch):
    def stale(*_):
        raise StaleQueue("made of bfloat16. Delete it")

    monkeypatch.setattr(Inputs, "queue", stale)
    arm = world.engine.arms["eim"]
    nearest = NearestKeys(world.inputs, [arm])
    with pytest.raises(
        RequestError, match=r"arm eim has no nearest keys here: the run's queue .* another kind of device"
    ):
        nearest.of(arm, np.zeros((8, 8, 3), np.uint8), 4)
