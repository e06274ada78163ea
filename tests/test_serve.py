"""A served run answers OpenAI's own client with what the library says, whoever else asks, until it is told to end."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import importlib.util
import io
import json
import re
import signal
import sys
import threading
import types
import urllib.request

import jax.numpy as jnp
import mains
import numpy as np
import pytest
from PIL import Image
from tiny import config_of

from eim_jax import api
from eim_jax import config as settings
from eim_jax.data.datasets import load_split
from eim_jax.training import partition, setup
from eim_jax.training.checkpoint import StageCheckpoints
from eim_jax.utils.files import write_json
from eim_jax.utils.images import clip_preprocess

openai = pytest.importorskip("openai", reason="the extra test brings OpenAI's client")
pytest.importorskip("uvicorn", reason="--mode=serve needs the extra serve")

from eim_jax.serving.engine import Engine  # noqa: E402
from eim_jax.serving.errors import RequestError  # noqa: E402
from eim_jax.serving.job import Call  # noqa: E402
from eim_jax.serving.nearest_keys import NearestKeys  # noqa: E402
from eim_jax.serving.served_arm import ServedArm  # noqa: E402
from eim_jax.serving.server import LOOPBACK, Server, listen  # noqa: E402
from eim_jax.serving.service import Options, Service  # noqa: E402
from eim_jax.serving.text_stream import TextStream  # noqa: E402

MANY = 32


class World:
    """The arms of a run as training would start them, served, beside the library's view of the same arms."""

    def __init__(self, config, workdir, neighbours=False):
        self.inputs = setup.load(config, workdir)
        self.runs, arms = {}, {}
        for name in config.arms:
            model = setup.start(self.inputs, config.arm[name])
            self.runs[name] = api.Run(self.inputs, name)
            self.runs[name].__dict__["_trained"] = model  # an untrained arm answers as well as a trained one
            arms[name] = ServedArm(name, self.inputs, *model)
        self.engine = Engine(arms, max_waiting=256)
        self.engine.start()
        self.nearest = NearestKeys(self.inputs, arms.values()) if neighbours else None
        test = load_split(config, "test", workdir)
        self.pictures = [test.images[row] for row in range(4)]

    @contextlib.contextmanager
    def listening(self, **options):
        """(server, its address)."""
        service = Service(self.inputs.config, self.inputs.workdir, self.engine, Options(**options), self.nearest)
        server, loops = Server(service, listen("127.0.0.1", 0)), concurrent.futures.Future()
        server._socket.listen()

        async def run():
            loops.set_result(asyncio.get_running_loop())
            await server.run_until_stopped(signals=False)

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        server.loop = loops.result()
        try:
            yield server, f"http://127.0.0.1:{server._socket.getsockname()[1]}"
        finally:
            if thread.is_alive():
                server.loop.call_soon_threadsafe(server.drain)
            thread.join()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    fields = {"data.scenes": 16, "decode.methods": ("greedy",), "decode.max_tokens": 8, "decode.batch": 8}
    made = World(config_of("miniature", **fields), tmp_path_factory.mktemp("run"), neighbours=True)
    yield made
    made.engine.stop()


@pytest.fixture(scope="module")
def address(world):
    with world.listening(hosts=LOOPBACK) as (_, found):
        yield found


@pytest.fixture(scope="module")
def client(address):
    with client_of(address) as made:
        yield made


def client_of(address, **options):
    return openai.OpenAI(base_url=f"{address}/v1", max_retries=0, **{"api_key": "none", **options})


def data_url(picture) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asked(picture=None, words="", url="") -> list:
    parts = [{"type": "image_url", "image_url": {"url": url or data_url(picture)}}] if picture or url else []
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": words}] if words else [])]}]


def post(address, path, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    wanted = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(wanted) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


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


PICTURE = "data:image/png;base64,iVBORw0KGgo="
BAD = {
    "model": ({"model": "third"}, 404, "model", "model_not_found"),
    "n": ({"n": 2}, 400, "n", "unsupported_value"),
    "unknown": ({"extra_body": {"top_k": 5}}, 400, "top_k", "unknown_parameter"),
    "temperature": ({"temperature": 3}, 400, "temperature", None),
    "stop": ({"stop": ["a", ""]}, 400, "stop", None),
    "messages": ({"messages": []}, 400, "messages", None),
    "beam": ({"extra_body": {"method": "beam"}, "seed": 1}, 400, "seed", None),
    "no picture": ({"messages": asked(words="hello")}, 400, "messages", None),
    "words": ({"messages": asked(url=PICTURE, words="hello")}, 400, "messages[0]", None),
    "remote": ({"messages": asked(url="https://example.org/a.png")}, 400, "messages[0]", "invalid_image_url"),
    "file": ({"messages": asked(url="/etc/passwd")}, 400, "messages[0]", "invalid_image_url"),
    "base64": ({"messages": asked(url="data:image/png;base64,?")}, 400, "messages[0]", "invalid_base64_image"),
    "damaged": ({"messages": asked(url=PICTURE)}, 400, "messages[0]", "invalid_image"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_in_openai_s_form(client, world, case):
    change, status, param, code = BAD[case]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "eim", "messages": asked(world.pictures[0]), **change})
    found = caught.value
    assert (found.status_code, found.param, found.code) == (status, param, code)
    assert found.type == "invalid_request_error" and found.body["message"]


def test_only_those_may_ask_who_should(world):
    body = {"model": "eim", "messages": asked(world.pictures[0]), "max_tokens": 1}
    with world.listening(api_key="secret", max_body=20_000, hosts=LOOPBACK) as (_, address):
        with pytest.raises(openai.AuthenticationError), client_of(address) as stranger:
            stranger.models.list()
        with client_of(address, api_key="secret") as friend:
            assert friend.chat.completions.create(**body).usage.completion_tokens == 1
            with pytest.raises(openai.APIStatusError, match="larger than 20,000 bytes") as caught:
                friend.chat.completions.create(model="eim", messages=asked(url="data:," + "a" * 30_000))
            assert caught.value.status_code == 413
        key = {"Authorization": "Bearer secret"}
        path = "/v1/chat/completions"
        assert post(address, path, b"{", **key)[0] == 400
        # What a page of another origin could send: without leave to, or to a name of its own.
        assert post(address, path, body, **key, **{"Content-Type": "text/plain"})[0] == 415
        assert post(address, path, body, **key, Host="evil.example")[0] == 403
        # The report is a link, which carries no header: whoever had the key is given a cookie for it alone.
        with urllib.request.urlopen(urllib.request.Request(address + "/api/run", headers=key)) as found:
            cookie = {"Cookie": found.headers["Set-Cookie"].partition(";")[0]}
        for path, headers, status in (("/report", {}, 401), ("/report", cookie, 404), ("/v1/models", cookie, 401)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(address + path, headers=headers))
            assert refused.value.code == status
        for page in ("/", "/page.js", "/page.css", "/health"):
            with urllib.request.urlopen(address + page) as found:
                assert found.status == 200
    full = Engine({}, max_waiting=1)  # not started: what it is given waits
    full.submit(Call("eim", lambda arm: None, lambda event: None))
    with pytest.raises(RequestError, match="wait already") as refused:
        full.submit(Call("eim", lambda arm: None, lambda event: None))
    assert refused.value.status == 429


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


def test_what_is_under_way_is_answered_when_the_server_ends(world):
    with world.listening() as (server, address), client_of(address) as client, contextlib.ExitStack() as stack:
        release = threading.Event()
        stack.callback(release.set)
        world.engine.submit(Call("eim", lambda arm: release.wait(), lambda event: None))  # the model is busy
        stream = client.chat.completions.create(model="eim", messages=asked(world.pictures[0]), stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        server.loop.call_soon_threadsafe(server.drain)
        while not server.gate.draining:
            pass
        with pytest.raises(openai.InternalServerError) as refused:
            client.models.list()
        assert refused.value.status_code == 503
        release.set()
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert said == world.runs["eim"].caption(world.pictures[0])[0]


def test_whoever_leaves_gives_up_its_place(world, client, address, monkeypatch):
    jobs, submit = [], world.engine.submit
    with monkeypatch.context() as watched, contextlib.ExitStack() as stack:
        release = threading.Event()
        stack.callback(release.set)
        submit(Call("eim", lambda arm: release.wait(), lambda event: None))  # the model is busy
        watched.setattr(world.engine, "submit", lambda job: (submit(job), jobs.append(job)))
        body = {"model": "eim", "messages": asked(world.pictures[0])}
        stream = client.chat.completions.create(**body, stream=True)
        next(stream)
        stream.close()
        plain = http.client.HTTPConnection(address.removeprefix("http://"))
        plain.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        while len(jobs) < 2:
            pass
        plain.close()
        while not all(job.cancelled for job in jobs):
            pass
    assert client.chat.completions.create(**body).choices[0].message.content
    assert not world.engine._workers["eim"].waiting


def test_a_failure_of_the_model_is_told_to_those_who_wait_and_to_nobody_after_them(world, client, monkeypatch):
    arm = world.engine.arms["eim"]
    with monkeypatch.context() as broken:
        broken.setattr(arm, "see", lambda crops: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError") as caught:
            client.chat.completions.create(model="eim", messages=asked(world.pictures[0]))
        assert caught.value.type == "server_error"
    found = client.chat.completions.create(model="eim", messages=asked(world.pictures[0]))
    assert found.choices[0].message.content == world.runs["eim"].caption(world.pictures[0])[0]


def test_a_run_that_follows_instructions_is_asked_in_its_own_form(tmp_path):
    config = config_of("miniature_lavin", **{"arms": ("eim",), "data.scenes": 16, "decode.max_tokens": 4})
    world = World(dataclasses.replace(config, decode=dataclasses.replace(config.decode, batch=8)), tmp_path)
    with world.listening() as (_, address), client_of(address) as client:
        for picture in (world.pictures[0], None):
            found = client.chat.completions.create(model="eim", messages=asked(picture, "What is this?"))
            assert found.choices[0].message.content == world.runs["eim"].ask(picture, "What is this?")
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


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A work directory whose baseline ended as it began."""
    workdir, config = tmp_path_factory.mktemp("finished"), world.inputs.config
    params = world.runs["baseline"]._trained[1]
    leaves, _ = partition.split(params, partition.groups(config.stages["base"], params))
    with StageCheckpoints(workdir / "baseline" / "checkpoints" / "0-base") as store:
        store.finish(leaves, {})
    write_json(workdir / "run.json", {"config": settings.as_dict(config), "identity": world.inputs.fingerprints})
    return workdir


def test_lmms_eval_is_answered_as_the_library_answers(world, finished, monkeypatch):
    """With a stand-in for lmms-eval's base class where lmms-eval is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        base = types.ModuleType("lmms_eval.api.model")
        base.lmms = type("lmms", (), {"cache_hook": types.SimpleNamespace(add_partial=lambda *_: None)})
        for name in ("lmms_eval", "lmms_eval.api"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
    from eim_jax.commands.lmms_eval_model import FinishedRun

    model = FinishedRun(str(finished), arm="baseline", ignore_text="True", batch_size=1)
    model.task_dict = {"own": {"test": [{"picture": picture, "words": "a red ring."} for picture in world.pictures]}}

    def instances(second, count=4):
        rest = [lambda row: [row["picture"]]]
        return [types.SimpleNamespace(args=("Describe it.", second, *rest, i, "own", "test")) for i in range(count)]

    greedy = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    assert model.generate_until(instances(greedy)) == world.runs["baseline"].caption(world.pictures)
    [(likely, said)] = model.loglikelihood(instances(lambda row: row["words"], 1))
    nll, count = world.engine.call("baseline", lambda arm: arm.likelihood(_crop(world, 0), "", "a red ring."))
    assert likely == pytest.approx(-nll * count, abs=1e-4) and said is False
    with pytest.raises(ValueError, match="task own, document 0: generation setting 'best_of'"):
        model.generate_until(instances({"best_of": 2}))
    model.task_dict["own"]["test"][0]["picture"] = np.zeros(3)
    with pytest.raises(ValueError, match="document 0: ndarray: a run looks at one picture"):
        model.generate_until(instances(greedy))
    model._engine.stop()


def _crop(world, row):
    return clip_preprocess(world.pictures[row], world.inputs.clip.vision.image_size, world.inputs.fit)


def test_the_command_serves_a_finished_run_until_a_signal(finished, tmp_path):
    flags = ["--mode=serve", f"--workdir={finished}", "--port=0", "--config.decode.batch=2"]
    process = mains.Main(flags, tmp_path / "said.txt")
    try:
        process.until(lambda: "/v1" in process.said())
        assert "not served: stage st of arm eim is not finished" in process.said()
        with client_of(re.search(r"http://[\d.:]+", process.said())[0]) as client:
            found = client.chat.completions.create(model="baseline", messages=asked(Image.new("RGB", (40, 30), "red")))
            assert found.usage.completion_tokens
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.said()
        assert "stopped: all that was begun is answered" in process.said()
    finally:
        process.kill()


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
