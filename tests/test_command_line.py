"""What the command line says of itself, and what --config takes."""

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from eim_jax import __version__, main
from eim_jax import config as settings
from eim_jax.commands import command_line
from eim_jax.commands import help as texts
from eim_jax.config import Config, LossWeights, flatten, listing
from eim_jax.losses.table import LOSSES
from eim_jax.training import kinds

ROOT = Path(__file__).resolve().parent.parent
OWN = {flag.name: flag for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]}


def said(*arguments: str) -> str:
    """What `eim_jax ARGUMENTS` prints before it would run anything."""
    text = command_line.said(["eim_jax", *arguments], list(OWN.values()))
    assert text is not None
    return text


def test_help_lists_every_mode_flag_and_preset():
    text = said("--help")
    assert [f"--{name}" for name in OWN if f"  --{name} " not in text] == []
    assert [name for name in texts.presets() if f"\n  {name} " not in text] == []
    modes = text.split("modes:")[1].split("flags of a mode:")[0]
    assert [name for name in main.MODES if f"\n  {name} " not in modes] == []
    named = {name for mode in main.MODES.values() for name in mode.flags}
    assert named <= OWN.keys()
    assert max(map(len, text.splitlines())) < 120


def test_help_of_config_lists_every_field_with_its_default():
    text = said("--help=config")
    for path, default in flatten(Config()).items():
        assert f"  {path} (" in text and repr(default) in text, path
    groups = kinds.field_groups()
    assert "data.annotations" in {field.path for group in groups for field in group.fields}
    for field in (f for group in groups for f in group.fields):
        assert field.said in " ".join(text.split()), field.path


def test_a_field_is_said_by_the_comment_above_or_behind_it():
    @dataclasses.dataclass
    class Some:
        """Words."""

        # Above,
        # on two lines.
        first: int = 1
        second: tuple = (2,)  # behind

    found = {field.path: field for group in listing.groups(Some, "x") for field in group.fields}
    assert found["x.first"] == ("x.first", "int", 1, "Above, on two lines.")
    assert found["x.second"] == ("x.second", "tuple", (2,), "behind")


def test_version_names_what_decides_the_numbers():
    assert said("--version").startswith(f"eim_jax {__version__} (python ")
    assert "jax " in said("--version")


@pytest.mark.parametrize("form", [["--config=photos"], ["--config", "photos"]])
def test_a_preset_is_a_name(form):
    [*_, word] = command_line.presets_as_files(["eim_jax", *form])
    file = Path(word.removeprefix("--config="))
    assert file.samefile(ROOT / "configs" / "photos.py")


def test_files_stay_files_and_an_unknown_preset_names_the_nearest():
    for word in ("--config=configs/photos.py", "--config=mine.py:argument", "--workdir=photos"):
        assert command_line.presets_as_files(["eim_jax", word]) == ["eim_jax", word]
    with pytest.raises(SystemExit, match="did you mean photos"):
        command_line.presets_as_files(["eim_jax", "--config=photo"])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--config="], r"--config= names nothing: give a preset \(.*photos"),
        (["--config=photos", "--config=miniature"], "--config is given more than once"),
        (["--config=photos", "--config", ""], "--config is given more than once"),
    ],
)
def test_an_empty_or_second_config_is_said(words, match):
    with pytest.raises(SystemExit, match=match):
        command_line.presets_as_files(["eim_jax", *words])


@pytest.mark.parametrize("module", ["eim_jax", "eim_jax.main"])
def test_either_command_reads_the_same_flags(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == said("--help")


def test_configs_inherit_over_at_most_two_levels():
    def parents(name: str) -> set[str]:
        """The configs whose get_config this one calls."""
        tree = ast.parse((ROOT / "configs" / f"{name}.py").read_text())
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        return {f.value.id for f in calls if isinstance(f, ast.Attribute) and f.attr == "get_config"}

    def depth(name: str) -> int:
        return max((1 + depth(parent) for parent in parents(name)), default=0)

    depths = {name: depth(name) for name in texts.presets()}
    assert max(depths.values()) == 2, depths


def test_the_package_s_configs_are_those_of_the_checkout():
    module = importlib.import_module("eim_jax.configs.photos")
    assert Path(module.__file__).samefile(ROOT / "configs" / "photos.py")


@pytest.fixture
def own(tmp_path):
    """(a config file with a loss of its own, the workdir of a run that was trained with it at another rate)."""
    file, workdir = tmp_path / "own.py", tmp_path / "run"
    file.write_text(
        "import dataclasses\n"
        "from eim_jax.configs import miniature\n"
        "from eim_jax.losses.table import LOSSES\n"
        "LOSSES['mine'] = dataclasses.replace(LOSSES['ie'], name='mine')\n"
        "def get_config():\n"
        "    config = miniature.get_config()\n"
        "    config.stages.ie.losses.mine = 0.5\n"
        "    return config\n"
    )
    config = settings.from_config_dict(importlib.import_module("eim_jax.configs.miniature").get_config())
    config.stages["ie"] = dataclasses.replace(config.stages["ie"], lr=0.125, losses=LossWeights({"mine": 0.5}))
    workdir.mkdir()
    (workdir / "run.json").write_text(json.dumps({"config": settings.as_dict(config)}))
    yield file, workdir
    LOSSES.pop("mine", None)


@pytest.mark.parametrize("form", ["--config={}", "-config={}", "--config {}"])
def test_a_command_on_a_run_takes_its_config_and_from_a_file_what_it_enters(own, form):
    file, workdir = own
    words = ["eim_jax", "--mode=caption", *form.format(file).split(), f"--workdir={workdir}", "photo.jpg"]
    left, values = command_line._config_of_run(words)
    assert left == ["eim_jax", "--mode=caption", f"--workdir={workdir}", "photo.jpg"]
    assert values is not None and values.stages.ie.lr == 0.125 and values.stages.ie.losses.mine == 0.5
    kinds.check(settings.from_config_dict(values))


@pytest.mark.parametrize("change", [("--mode=caption", "--mode=train"), ("own.py", "none.py"), ("/run", "/none")])
def test_training_a_missing_file_and_a_new_workdir_leave_the_words_as_they_are(own, change):
    file, workdir = own
    words = [
        word.replace(*change) for word in ("eim_jax", "--mode=caption", f"--config={file}", f"--workdir={workdir}")
    ]
    assert command_line._config_of_run(words) == (words, None)


def test_a_misspelt_field_of_a_run_is_named_with_the_nearest(own):
    file, workdir = own
    command = [sys.executable, "-m", "eim_jax.main", "--mode=caption", f"--config={file}", f"--workdir={workdir}"]
    done = subprocess.run([*command, "--config.decode.max_tokns=3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "did you mean config.decode.max_tokens?" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_mode_is_about_a_run_or_makes_or_plans_one():
    assert {*command_line.OF_A_RUN, "train", "plan", "prepare"} == set(main.MODES)
