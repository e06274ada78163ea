"""A server without any arm yet: the report of a run that goes on, by its files, which it never writes."""

import json
import os
import urllib.error
import urllib.request

import pytest
from test_progress import STAGE, going_on, steps, write
from test_progress import workdir as workdir  # a fixture
from tiny import config_of

pytest.importorskip("openai", reason="the extra test brings OpenAI's client")
pytest.importorskip("uvicorn", reason="--mode=serve needs the extra serve")

from served import listening

from eim_jax import config as settings
from eim_jax.serving.engine import Engine
from eim_jax.serving.service import Options, Service


@pytest.fixture
def following(workdir):
    """The address of a server of this work directory."""
    config = config_of("miniature")
    run = json.loads((workdir / "run.json").read_text())
    write(workdir / "run.json", run | {"config": settings.as_dict(config)})
    with listening(Service(config, workdir, Engine({}, 1), Options())) as (_, address):
        yield address


@pytest.fixture
def ask(following):
    """What that server answers."""
    return lambda path: urllib.request.urlopen(following + path).read().decode()


def test_a_stage_that_finished_is_on_the_page_before_the_next_one_ends(workdir, ask):
    (workdir / "baseline" / "scores_test.json").unlink()
    with going_on(workdir):
        before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
        first, state = ask("/report"), json.loads(ask("/report/state"))
        run = json.loads(ask("/api/run"))
        assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before  # nothing is written there
        assert run["arms"] == [] and run["progress"]["state"] == "running" and not state["over"]
        assert state["version"] in first and '<script src="report.js" defer></script>' in first
        assert "1 · st</th>" in first and "2 · ie</th>" not in first  # the stage table: finished ones
        assert "Stage 2 · ie" in first  # the curves: what is logged
        assert ask("/report") == first
        steps(workdir / "eim", "ie", 1, 180)
        assert json.loads(ask("/report/state"))["version"] != state["version"]
        write(workdir / "eim" / "run.json", {"stages": [{"name": n, "steps": 20, **STAGE} for n in ("st", "ie")]})
        assert "2 · ie</th>" in ask("/report")
    assert json.loads(ask("/report/state"))["over"]


def test_the_page_that_a_run_wrote_is_shown_until_its_files_are_newer(workdir, ask):
    page, records = workdir / "report.html", workdir / "eim" / "metrics.jsonl"
    page.write_text("<html><head><title>the run's own</title></head></html>")
    now = page.stat().st_mtime
    os.utime(page, (now + 1, now + 1))  # file systems count times in steps: two writes may have the same
    assert "the run's own" in ask("/report")
    steps(workdir / "eim", "ie", 1, 180)
    os.utime(records, (now + 2, now + 2))
    assert "the run's own" not in ask("/report") and "Stage 2" in ask("/report")
    assert (workdir / "report.html").read_text().startswith("<html><head><title>the run's own")


def test_a_damaged_file_is_not_hidden_behind_an_older_page(workdir, ask):
    (workdir / "report.html").write_text("<html><head><title>the run's own</title></head></html>")
    write(workdir / "eim" / "run.json", {"stages": [{"name": n, "steps": 20, **STAGE} for n in ("st", "ie")]})
    (workdir / "eim" / "scores_test.json").write_text('{"greedy": 3')
    later = (workdir / "report.html").stat().st_mtime + 1
    os.utime(workdir / "eim" / "scores_test.json", (later, later))
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask("/report")
    assert "eim/scores_test.json" in refused.value.read().decode()
