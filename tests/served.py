"""A run's arms served as training would start them, and what asks them: for the tests of the server."""

import asyncio
import atexit
import base64
import concurrent.futures
import contextlib
import functools
import io
import json
import pathlib
import shutil
import tempfile
import threading
import urllib.request

import openai
import pytest
from tiny import config_of

from eim_jax import api
from eim_jax import config as settings
from eim_jax.data.datasets import load_split
from eim_jax.serving.engine import Engine
from eim_jax.serving.nearest_keys import NearestKeys
from eim_jax.serving.served_arm import ServedArm
from eim_jax.serving.server import LOOPBACK, Server, listen
from eim_jax.serving.service import Options, Service
from eim_jax.training import arm_model, setup
from eim_jax.utils.files import write_json


class World:
    """The arms of a run as training would start them, served, beside the library's view of the same arms."""

    def __init__(self, config, workdir, neighbours=False):
        self.inputs = setup.load(config, workdir)
        write_json(workdir / "run.json", {"config": settings.as_dict(config), "identity": self.inputs.fingerprints})
        self.runs, arms = {}, {}
        for name in config.arms:
            model = arm_model.start(self.inputs, config.arm[name])
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
        with listening(service) as found:
            yield found


@contextlib.contextmanager
def listening(service):
    """(a server of this service, its address)."""
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


@functools.cache
def _shared() -> World:
    """One for all files that a worker runs: its programs are compiled once."""
    folder = tempfile.mkdtemp(prefix="eim_jax-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fields = {"data.scenes": 16, "decode.methods": ("greedy",), "decode.max_tokens": 8, "decode.batch": 8}
    return World(config_of("miniature", **fields), pathlib.Path(folder), True)


@pytest.fixture(scope="module")
def world():
    return _shared()


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
