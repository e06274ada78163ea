"""`--mode=serve` and lmms-eval on a work directory: each arm answers from when its last stage is finished."""

import importlib.util
import json
import re
import shutil
import signal
import sys
import types
import urllib.request

import mains
import numpy as np
import pytest
from PIL import Image

openai = pytest.importorskip("openai", reason="the extra test brings OpenAI's client")
pytest.importorskip("uvicorn", reason="--mode=serve needs the extra serve")

from served import asked, client_of  # noqa: E402
from served import world as world  # noqa: E402 a fixture

from eim_jax import config as settings  # noqa: E402
from eim_jax.parallel.lock import locked  # noqa: E402
from eim_jax.training import partition  # noqa: E402
from eim_jax.training.checkpoint import StageCheckpoints  # noqa: E402
from eim_jax.utils.files import write_json  # noqa: E402
from eim_jax.utils.images import clip_preprocess  # noqa: E402


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


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_command_follows_a_run_and_serves_an_arm_once_it_is_finished(finished, tmp_path):
    """The arm's result is there, hidden until the server listens; the lock says that a run goes on."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    result = workdir / "baseline" / "checkpoints" / "0-base" / "result"
    hidden = result.rename(tmp_path / "hidden")
    with locked(workdir):
        before = files(workdir)
        flags = ["--mode=serve", f"--workdir={workdir}", "--port=0", "--config.decode.batch=2"]
        process = mains.Main(flags, tmp_path / "said.txt")
        try:
            process.until(lambda: "/v1" in process.said())
            assert "not served: stage base of arm baseline is not finished" in process.said()
            address = re.search(r"http://[\d.:]+", process.said())[0]
            said = json.load(urllib.request.urlopen(address + "/api/run"))
            assert said["arms"] == [] and set(said["pending"]) == {"baseline", "eim"}
            assert said["progress"]["words"].startswith("running: arm baseline, stage base (1 of 1), being prepared")
            with client_of(address) as client:
                with pytest.raises(openai.NotFoundError, match="stage base of arm baseline is not finished"):
                    client.chat.completions.create(model="baseline", messages=asked(Image.new("RGB", (40, 30))))
                hidden.rename(result)
                process.until(lambda: "arm baseline is finished, and answers" in process.said())
                found = client.chat.completions.create(model="baseline", messages=asked(Image.new("RGB", (40, 30))))
                assert found.usage.completion_tokens
                assert [model.id for model in client.models.list()] == ["baseline"]
            process.signal(signal.SIGTERM)
            assert process.wait(60) == 0, process.said()
            assert "stopped: all that was begun is answered" in process.said()
        finally:
            process.kill()
        assert files(workdir) == before | {name: at for name, at in files(workdir).items() if "0-base" in name}


def test_a_signal_while_an_arm_is_loaded_ends_the_server_and_blames_no_file(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    result = workdir / "baseline" / "checkpoints" / "0-base" / "result"
    hidden = result.rename(tmp_path / "hidden")
    process = mains.Main(["--mode=serve", f"--workdir={workdir}", "--port=0"], tmp_path / "said.txt")
    try:
        process.until(lambda: "/v1" in process.said())
        hidden.rename(result)
        process.until(lambda: "towers " in process.said())  # read, and about to be compiled
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.said()
        assert process.said().rstrip().endswith("stopped: all that was begun is answered"), process.said()
    finally:
        process.kill()
