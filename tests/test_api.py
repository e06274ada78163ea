"""A finished run opened in Python says what the command line says of the same pictures and questions."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_examples import example
from tiny import config_of

import eim_jax
from eim_jax import api
from eim_jax import config as settings
from eim_jax.commands import caption, chat
from eim_jax.config import ConfigError
from eim_jax.data.datasets import load_split
from eim_jax.losses.key_sources import LM_TEXTS
from eim_jax.training import arm_model, setup
from eim_jax.training.arm import run_arm
from eim_jax.utils.files import write_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(work directory of a run of one stage, three of its test pictures as files)."""
    workdir = tmp_path_factory.mktemp("run")
    config = config_of(
        "miniature",
        **{"arms": ("baseline",), "data.scenes": 16, "decode.methods": ("greedy",), "decode.max_tokens": 6},
        **{f"stages.base.{name}": value for name, value in {"steps": 2, "warmup_steps": 1, "batch": 16}.items()},
    )
    inputs = setup.load(config, workdir)
    write_json(workdir / "run.json", {"config": settings.as_dict(config), "identity": inputs.identity()})
    run_arm(inputs, "baseline")
    test = load_split(config, "test", workdir)
    files = [workdir / f"{row}.png" for row in range(3)]
    for row, file in enumerate(files):
        test.images[row].save(file)
    return workdir, files


@pytest.fixture(scope="module")
def run(finished):
    return eim_jax.load(finished[0])


def test_captions_are_the_command_line_s_whatever_form_a_picture_has(finished, run, tmp_path):
    workdir, files = finished
    caption.caption(run.config, workdir, "baseline", list(files), tmp_path / "captions.json")
    said = [row["caption"] for row in json.loads((tmp_path / "captions.json").read_text())]
    assert run.caption(files) == said
    pictures = [str(files[0]), api._read(files[1]), np.asarray(api._read(files[2]))]
    assert run.caption([*pictures, files[0]]) == [*said, said[0]]
    assert run.caption(files[1]) == [said[1]]
    assert run.caption([]) == []


def test_the_model_s_functions_take_the_run_s_parameters(run, finished):
    pixels = jnp.asarray(np.asarray(api._read(finished[1][0]))[None])
    visual = run.model.connect(run.params, run.model.encode_image(run.params, pixels))
    logits = run.model.token_logits(run.params, visual, jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3), bool))
    assert logits.shape == (1, 3, run.model.lm.config.vocab) and jnp.isfinite(logits).all()


def test_the_example_reads_the_run(finished, run, capsys):
    workdir, files = finished
    assert example("read_run").main(str(workdir), list(map(str, files))) == run.caption(files)
    assert "loss/base" in capsys.readouterr().out


def test_decoding_can_be_asked_for(finished, run):
    workdir, files = finished
    short = eim_jax.load(workdir, max_tokens=2)
    whole = run.caption(files)
    assert all(text.startswith(start) for text, start in zip(whole, short.caption(files), strict=True))
    assert short.caption(files) != whole
    assert len(run.caption(files, method="beam")) == 3


def test_what_cannot_be_opened_or_asked_is_said(finished, run, tmp_path):
    workdir, files = finished
    with pytest.raises(ConfigError, match="holds no run"):
        eim_jax.load(tmp_path)
    with pytest.raises(ConfigError, match="no arm 'eim'; this run has baseline"):
        eim_jax.load(workdir, arm="eim")
    with pytest.raises(ConfigError, match="no field 'beam'"):
        eim_jax.load(workdir, beam=3)
    with pytest.raises(ConfigError, match="use caption"):
        run.ask(files[0], "what is it?")
    with pytest.raises(ValueError, match=r"no-such-file\.png"):
        run.caption([tmp_path / "no-such-file.png"])
    with pytest.raises(ValueError, match="uint8"):
        run.caption(np.zeros((4, 4), np.float32))


def test_answers_are_those_of_a_conversation_s_first_turn(tmp_path):
    config = config_of("miniature_lavin", **{"data.scenes": 16, "decode.max_tokens": 4})
    inputs = setup.load(config, tmp_path)
    vlm, params = arm_model.start(inputs, config.arm["eim"])
    run = api.Run(inputs, "eim")
    run.__dict__["_trained"] = (vlm, params)  # an untrained arm answers as well as a trained one
    test = load_split(config, "test", tmp_path)
    file = tmp_path / "picture.png"
    test.images[0].save(file)
    one = dataclasses.replace(config, decode=dataclasses.replace(config.decode, batch=1))
    for picture in (file, None):
        said = chat.answer(dataclasses.replace(inputs, config=one), vlm, params, picture, "What is this?")
        assert run.ask(picture, "What is this?") == said
    with pytest.raises(ConfigError, match="use ask"):
        run.caption([file])


def test_how_prompt_and_answer_are_joined_is_settled_once_and_kept(tmp_path):
    config = config_of("miniature_lavin")
    assert config.data.seam == "auto"
    fresh = setup.load(config, tmp_path, data=False)
    assert fresh.config.data.seam == "one_string"
    assert LM_TEXTS.described(fresh).endswith(", at most 140 tokens, one_string, cut balanced")
    write_json(tmp_path / "run.json", {"config": settings.as_dict(config)})  # of a version that did not say
    earlier = setup.load(config, tmp_path, data=False)
    assert earlier.config.data.seam == "apart" == settings.read_saved(tmp_path).data.seam
    assert LM_TEXTS.described(earlier).endswith(", at most 140 tokens")
