"""What a server refuses, and how: in OpenAI's form; it ends, and fails, without losing what was begun."""

import contextlib
import http.client
import json
import threading
import urllib.request

import pytest

openai = pytest.importorskip("openai", reason="the extra test brings OpenAI's client")
pytest.importorskip("uvicorn", reason="--mode=serve needs the extra serve")

from served import address as address  # noqa: E402 fixtures
from served import asked, client_of, post  # noqa: E402
from served import client as client  # noqa: E402
from served import world as world  # noqa: E402

from eim_jax.serving.engine import Engine  # noqa: E402
from eim_jax.serving.errors import RequestError  # noqa: E402
from eim_jax.serving.job import Call  # noqa: E402
from eim_jax.serving.server import LOOPBACK  # noqa: E402

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
        for path in ("/report", "/report/state"):
            with urllib.request.urlopen(urllib.request.Request(address + path, headers=cookie)) as found:
                assert found.status == 200
        for path, headers, status in (("/report", {}, 401), ("/report/state", {}, 401), ("/v1/models", cookie, 401)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(address + path, headers=headers))
            assert refused.value.code == status
        for page in ("/", "/page.js", "/page.css", "/report.js", "/health"):
            with urllib.request.urlopen(address + page) as found:
                assert found.status == 200
    full = Engine({}, max_waiting=1)  # not started: what it is given waits
    full.submit(Call("eim", lambda arm: None, lambda event: None))
    with pytest.raises(RequestError, match="wait already") as refused:
        full.submit(Call("eim", lambda arm: None, lambda event: None))
    assert refused.value.status == 429


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
