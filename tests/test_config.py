"""Configs: every shipped one builds, overrides arrive, mistakes are named, a workdir knows its own."""

import importlib
from pathlib import Path

import mains
import pytest

from eim_jax import config as settings
from eim_jax.commands import command_line
from eim_jax.config import Arm, Config, ConfigError, LossWeights, Stage, checks
from eim_jax.training import kinds

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("base", "__init__"))


def built(name="miniature"):
    return importlib.import_module(f"configs.{name}").get_config()


def tiny(**fields):
    stage = Stage(train=("st/.*",), losses=LossWeights(st=1.0), warmup_steps=0)
    values = {"arms": ("a",), "arm": {"a": Arm(sequence=("s",))}, "stages": {"s": stage}, **fields}
    return settings.as_dict(Config(**values))


def checked(values):
    """What main does with a config at its door."""
    config = settings.from_config_dict(values)
    kinds.check(config)
    return config


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_config_is_valid_and_survives_the_round_trip(name):
    config = checked(built(name))
    assert checked(kinds.to_config_dict(config)) == config
    assert not kinds.differences(config, config)


def test_the_papers_coco_settings():
    stage = settings.from_config_dict(built("clipcap_eim_coco")).stages["ie"]
    assert (stage.epochs, stage.batch, stage.lr, stage.warmup_steps) == (10, 40, 2e-5, 5000)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("losses.similarity", "cosin", "config.losses.similarity: 'cosin' is none of cosine, dot"),
        ("decode.beams", 0, "config.decode.beams: 0 is not in 1 .."),
        ("log_every", 0, "config.log_every: 0 is not in 1 .."),
        ("arms", (), "config.arms and config.decode.methods need at least one entry"),
        ("mesh", (1, -1), r"config.mesh: \(1, -1\) is not \(data, fsdp, tensor\)"),
        ("arm.a.st", "mpl", "config.arm.a.st: 'mpl' is none of ffn, mlp"),
        ("arm.a.features", "patches", "config.arm.a.features: 'patches' is none of full, cls"),
        ("arm.a.adapter", "lora", "config.arm.a.adapter: 'lora' is none of none, lavin, prompts"),
        ("arm.a.adapter", "lavin", "adapter='lavin', but no stage of its sequence trains it.*'lm/adapter/"),
        ("arm.a.visual_adapter", True, "config.arm.a.visual_adapter needs config.arm.a.adapter='lavin'"),
        ("arm.a.st", "mlp", "config.arm.a.st: 'mlp' maps one token: set config.arm.a.features='cls'"),
        ("arm.a.sequence", ("x",), "config.arm.a.sequence: no stage 'x'; config.stages has s"),
        ("arm.a.prompts", 4, "no stage of its sequence trains it"),
        ("stages.s.train", ("st/.*", 0.1), r"train entry 0.1 is neither a pattern nor"),
        ("stages.s.train", ("st/(",), "is no regular expression"),
        ("stages.s.accumulate", 3, "accumulate=3 does not divide config.stages.s.batch=40"),
        ("stages.s.losses.st", 0.0, "every weight is 0"),
        ("stages.s.warmup_epochs", 10.0, r"config.stages.s.warmup_epochs=10 \(which overrides warmup_steps=0\) leaves"),
        ("stages.s.b1", 1.0, "config.stages.s.b1: 1.0 is not in 0.0 .."),
        ("stages.s.b2", -0.1, "config.stages.s.b2: -0.1 is not in 0.0 .."),
        ("stages.s.eps", 0.0, "config.stages.s.eps: 0.0 is not in 1e-30 .."),
        ("stages.s.eps", float("nan"), "config.stages.s.eps: nan is no finite number"),
        ("stages.s.lr", float("inf"), "config.stages.s.lr: inf is no finite number"),
        ("stages.s.losses.st", float("nan"), "config.stages.s.losses.st: nan is no finite number"),
        ("stages.s.steps", -1, "config.stages.s.steps: -1 is not in 0 .."),
        ("stages.s.lr", 10**400, "config.stages.s.lr: a number of 401 digits is no float"),
        (
            "stages.s.train",
            (("st/.*", float("inf")),),
            r"config.stages.s.train: train entry \('st/.\*', inf\) is neither",
        ),
        ("stages.s.train", ("st/(",), r"config.stages.s.train: train pattern 'st/\(' is no regular expression"),
        ("arm.a.st_hidden", 0, "config.arm.a.st_hidden: 0 is not in 1 .."),
        ("arm.a.st_heads", 0, "config.arm.a.st_heads: 0 is not in 1 .."),
        ("arm.a.prompt_hidden", -1, "config.arm.a.prompt_hidden: -1 is not in 0 .."),
        ("mesh", ("a", 1, 1), r"config.mesh: \('a', 1, 1\) is not \(data, fsdp, tensor\)"),
        ("mesh", (1, 1.5, 1), r"config.mesh: \(1, 1.5, 1\) is not"),
        ("data.buckets", 0, "config.data.buckets: 0 is not in 1 .. 64"),
        ("data.pack", "yes", "config.data.pack: 'yes' is none of off, on, auto"),
        ("data.length_window", 0, "config.data.length_window: 0 is not in 1 .."),
        ("profile", "15:10", "config.profile: '15:10' is not first:end of some steps, such as '10:15'"),
        ("profile", "ten", "config.profile: 'ten' is not first:end"),
        ("data.max_tokens", "many", "config.data.max_tokens: 'many' is not a int"),
        ("data.max_tokn", 3, "config.data.max_tokn: no such field; did you mean 'max_tokens'?"),
        ("data.anotations", "a", "config.data.anotations: no such field; did you mean 'annotations'?"),
        ("data.annotations", 3, "config.data.annotations: 3 is not a str"),
        ("arms", ({"name": "a"},), "config.arms: {'name': 'a'} is no name"),
        ("arm.a.sequence", (7,), "config.arm.a.sequence: 7 is no name"),
        ("decode.methods", (None,), "config.decode.methods: None is no name"),
        ("arm.a", 7, "config.arm.a: 7 is not a group of fields"),
        ("towers", "clip", "config.towers: 'clip' is not a group of fields"),
        ("data.kind", "cocoa", "config.data.kind: 'cocoa' is none of coco, .*; did you mean 'coco'?"),
    ],
)
def test_a_wrong_value_is_an_error_naming_the_field(field, value, message):
    values = tiny()
    *path, name = field.split(".")
    place = values
    for step in path:
        place = place[step]
    place[name] = value
    with pytest.raises(ConfigError, match=message):
        checked(values)


@pytest.mark.parametrize(
    ("fields", "per_epoch", "problem"),
    [
        (
            {"steps": 5, "warmup_steps": 5},
            None,
            "warmup_steps=5 leaves nothing of the stage's steps=5 (which overrides",
        ),
        ({"steps": 6, "warmup_steps": 5}, None, None),
        ({"epochs": 2, "warmup_epochs": 2.0}, None, "warmup_epochs=2 (which overrides warmup_steps=5000) leaves"),
        ({"epochs": 2, "warmup_steps": 20}, None, None),  # not to be known before the data are read
        (
            {"epochs": 2, "warmup_steps": 20},
            10,
            "warmup_steps=20 is 20 steps, which leaves nothing of the stage's epochs=2",
        ),
        (
            {"steps": 9, "warmup_epochs": 1.0},
            10,
            "warmup_epochs=1 (which overrides warmup_steps=5000) is 10 steps, which",
        ),
        ({"epochs": 2, "warmup_steps": 19}, 10, None),
    ],
)
def test_a_warmup_that_leaves_nothing_names_the_fields_that_decided(fields, per_epoch, problem):
    found = checks.warmup_problem(Stage(**fields), per_epoch)
    assert (found is None) if problem is None else found.startswith(problem)


def test_only_fields_that_decide_the_parameters_make_another_run():
    base = settings.from_config_dict(built())

    def changed(**overrides):
        values = built()
        values.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
        return kinds.differences(base, settings.from_config_dict(values))

    assert changed(decode__beams=9) == changed(log_every=7) == changed(data__cache="elsewhere") == []
    assert changed(arms=("eim",), stages__base__lr=0.5) == []  # the arm that is not asked for
    assert changed(stages__base__accumulate=2) == changed(towers__remat="full") == changed(data__eval_images="e") == []
    assert changed(data__cache_features=False) == ["data.cache_features: True in the workdir, False asked for"]
    assert changed(stages__ie__lr=0.5) == ["stages.ie.lr: 0.001 in the workdir, 0.5 asked for"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data.max_tokns=3", "config.data has no field 'max_tokns'; did you mean config.data.max_tokens?"),
        ("stages.ei.lr=1", "config.stages has no field 'ei'; did you mean config.stages.ie?"),
        ("stages.ie.learning=1", "config.stages.ie has no field 'learning'; "),
        ("arm.eim.sequence=('st','xx')", "config.arm.eim.sequence: no stage 'xx'"),
        ("=3", "config has no field ''; it has "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, flag, message):
    flags = ["--config=configs/miniature.py", f"--workdir={tmp_path}", f"--config.{flag}"]
    code, said = mains.run(flags, tmp_path / "said.txt")
    assert code != 0 and message in said and "Traceback" not in said


def test_a_workdir_may_stand_behind_a_space():
    assert command_line.given(["main", "--workdir", "runs/a", "--mode=eval"], "workdir") == "runs/a"
    assert command_line.given(["main", "--mode=eval", "--workdir=runs/a=b"], "workdir") == "runs/a=b"
    assert command_line.given(["main", "--workdirs=x"], "workdir") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=eval"], "holds no run"),
        (["--config=configs/miniature.py", "--mode=caption"], "needs images"),
        (
            [
                "--config=configs/photos.py",
                "--config.data.annotations=",
                "--config.towers.clip=miniature/clip",
                "--config.towers.lm=miniature/gpt2",
            ],
            "config.data.annotations is empty",
        ),
    ],
)
def test_what_a_mode_lacks_is_said(tmp_path, flags, message):
    code, said = mains.run([f"--workdir={tmp_path}", *flags], tmp_path / "said.txt")
    assert code != 0 and message in said


def test_conversations_have_no_validation_questions():
    with pytest.raises(
        ConfigError, match=r"config\.data\.scored='val': data of kind 'miniature_chat' is scored on test"
    ):
        checked(tiny(data=settings.Data(kind="miniature_chat", scored="val")))


def test_distillation_is_a_matter_of_angles():
    with pytest.raises(ConfigError, match=r"config\.losses\.lm_distil needs config\.losses\.similarity='cosine'"):
        kinds.check(settings.from_config_dict(tiny(losses=settings.Losses(lm_distil=True, similarity="dot"))))
