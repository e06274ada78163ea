"""README and docs: every command can be given, every field, file, module, link and mode that is named is there."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import docs_text as docs
import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from eim_jax import config as settings
from eim_jax import main
from eim_jax.commands.help import MODES, presets
from eim_jax.training import kinds
from scripts import docs_pages

ROOT = docs.ROOT
RUNS = ("python -m eim_jax.main", "eim_jax", "launch/tpu_vm.sh", "sbatch")  # what takes main's flags
FLAGS = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]} | {"config"}
ASKED = {"help", "helpfull", "version"}  # what is answered without a run
SCRIPTS = "\n".join(
    file.read_text(encoding="utf-8")
    for room in ("benchmarks", "examples", "experiments", "scripts", "tests/fuzz")
    for file in (ROOT / room).glob("*.py")
)
TOPS = "eim_jax|experiments|configs|benchmarks|tests|scripts|launch|docs|examples"


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def known_fields() -> set[str]:
    """Every field of a run, those of data sets included, with * for the name of an arm or a stage; and their groups."""
    fields = {field.path for group in kinds.field_groups() for field in group.fields}
    return fields | {".".join(field.split(".")[:n]) for field in fields for n in range(1, field.count(".") + 1)}


def preset(value: str) -> str | None:
    """The config file that a --config names; None for a placeholder such as "..." or C."""
    if value.endswith(".py"):
        return str(ROOT / value)
    return None if value in ("...", "C") else str(ROOT / "configs" / f"{value}.py")


def check_field(override: str, where: str):
    field = override.removeprefix("--config.").partition("=")[0]
    wild = re.sub(r"^(arm|stages)\.[^.]+", r"\1.*", field)
    assert wild in known_fields(), f"{where}: config has no field {field}"


def check_run(words: list[str], where: str):
    """A command line of `main`: its flags are there, and its config is one that a run would accept."""
    overrides = [word for word in words if word.startswith("--config")]
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        assert not word.startswith("--") or name.split(".")[0] in FLAGS | ASKED, f"{where}: no flag {word}"
        assert name != "mode" or word.partition("=")[2] in MODES, f"{where}: no mode {word}"
    file = next((preset(word.partition("=")[2]) for word in overrides if word.startswith("--config=")), None)
    if file is None:
        for word in overrides:
            if word.startswith("--config."):
                check_field(word, where)
        return
    assert Path(file).exists(), f"{where}: no {file}"
    values = flags.FlagValues()
    command = ["main", *(f"--config={file}" if word.startswith("--config=") else word for word in overrides)]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    kinds.check(settings.from_config_dict(holder.value))


def check_script(file: Path, words: list[str], where: str):
    """A script's flags stand in its source, or in that of a neighbour which it imports."""
    assert file.exists(), f"{where}: no {file}"
    source = file.read_text(encoding="utf-8")
    imported = [
        name for line in re.findall(r"^(?:from|import) .*$", source, re.MULTILINE) for name in re.findall(r"\w+", line)
    ]
    for neighbour in (file.with_name(f"{name}.py") for name in imported):
        source += neighbour.read_text(encoding="utf-8") if neighbour.exists() else ""
    for word in words:
        flag = word.partition("=")[0]
        # Some scripts make their flags from a table: f"--{name}".
        made = 'f"--{' in source and re.search(rf"\b{flag[2:]}\b", source)
        assert not word.startswith("--") or f'"{flag}"' in source or made, f"{where}: {file.name} has no {flag}"


def module_file(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_command_can_be_given():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    seen = {"main": 0, "script": 0, "make": 0, "flags": 0}
    for page, words in docs.commands():
        where, line = f"{named(page)}: {' '.join(words)}", " ".join(words)
        if line.startswith(RUNS):
            seen["main"] += 1
            script = next((i for i, word in enumerate(words) if word.startswith("launch/")), None)
            assert script is None or (ROOT / words[script]).exists(), where
            check_run(words[1 + (script or (2 if words[0] == "python" else 0)) :], where)
        elif words[0] == "make":
            seen["make"] += 1
            asked = [word for word in words[1:] if "=" not in word]
            assert set(asked) <= set(targets), f"{where}: make has no such target"
        elif words[:2] == ["python", "-m"] and words[2] != "pytest":
            seen["script"] += 1
            check_script(module_file(words[2]), words[3:], where)
        elif (words[0].endswith(".py") and words[0][0] != "-") or (words[0] == "python" and words[1].endswith(".py")):
            seen["script"] += 1
            at = 1 if words[0] == "python" else 0
            check_script(ROOT / words[at], words[at + 1 :], where)
        elif words[0].startswith("--"):
            seen["flags"] += 1
            for word in words:
                name = word.partition("=")[0]
                if name.startswith("--config."):
                    check_field(word, where)
                elif word.startswith("--config="):
                    file = preset(word.partition("=")[2])
                    assert file is None or Path(file).exists(), where
                elif word.startswith("--mode="):
                    assert word.partition("=")[2] in MODES, where
                elif word.startswith("--"):
                    assert name[2:] in FLAGS | ASKED or f'"{name}"' in SCRIPTS, f"{where}: no flag {name}"
        elif words[0] == "kubectl" or words[:2] == ["docker", "build"]:
            assert (ROOT / words[words.index("-f") + 1]).exists(), where
        elif words[:2] == ["docker", "run"]:
            check_run(words[words.index("eim_jax") + 1 :], where)
        elif words[0] == "sky":
            file = ROOT / next(word for word in words if word.endswith(".yaml"))
            given = {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "--env"}
            assert given <= set(yaml.safe_load(file.read_text())["envs"]), where
        else:
            assert words[0] in (".", "pip", "export") or words[:3] == ["python", "-m", "pytest"], where
    assert seen["main"] > 15 and min(seen.values()) > 5, seen


@pytest.mark.parametrize("fence", docs.fences("sh"), ids=lambda fence: named(fence.page))
def test_shell_fences_parse(fence):
    found = subprocess.run(["bash", "-n"], input=fence.text, text=True, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr


def test_every_fence_has_a_language():
    for page in docs.PAGES:
        kinds_of = {found["kind"] for found in docs.FENCE.finditer(docs.text(page))}
        assert kinds_of <= {"sh", "python", "text", "json"}, f"{named(page)}: {kinds_of}"


@pytest.mark.parametrize("page", sorted({fence.page for fence in docs.fences("python")}), ids=named)
def test_python_fences_run(page, tmp_path, monkeypatch):
    """One after the other, in one namespace. What says that it is not run has names that exist all the same."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for fence in docs.fences("python"):
        if fence.page != page:
            continue
        tree = ast.parse(fence.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
        if not fence.skip and page.parent.name != "extend":  # theirs stand in tests/extend, in a run that proves them
            exec(compile(tree, str(page), "exec"), namespace)


def test_links_and_anchors_lead_somewhere():
    count = 0
    for page in docs.PAGES:
        for target in docs.links(page):
            count += 1
            if target.startswith(("https://", "mailto:")):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            where = f"{named(page)}: {target}"
            assert file.exists() or (file.name in docs_pages.RESULTS and file.parent.name == "results"), where
            assert not anchor or anchor in docs.anchors(file), where
    assert count > 100


@pytest.mark.parametrize("page", docs.PAGES, ids=named)
def test_headings_are_unique(page):
    found = docs.anchors(page)
    assert sorted(set(found)) == sorted(found)
    assert len(re.findall(r"^# ", docs.prose(page), flags=re.MULTILINE)) == 1


def test_every_mode_and_config_is_named():
    everything = "\n".join(map(docs.text, docs.PAGES))
    configs = [path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base")]
    assert len(configs) > 10
    readme = docs.text(ROOT / "README.md")
    assert [name for name in configs if name not in readme] == []
    assert [mode for mode in MODES if f"--mode={mode}" not in readme or f"--mode={mode}" not in everything] == []


def test_named_files_and_fields_exist():
    files, fields = 0, 0
    for page in docs.PAGES:
        for code in docs.inline(page):
            if re.fullmatch(rf"(?:{TOPS})/[\w./-]*", code):
                files += 1
                assert (ROOT / code).exists(), f"{named(page)}: no {code}"
            if re.fullmatch(r"(data|towers|losses|decode|checkpoint|eval|arm|stages)\.[\w.*]+(=\S+)?", code):
                fields += 1
                if not code.endswith(".*"):
                    check_field(code, named(page))
    assert files > 20 and fields > 30


def test_readme_is_short_and_has_its_picture():
    lines = docs.text(ROOT / "README.md").splitlines()
    assert len(lines) <= 200
    assert any(line.startswith("![") for line in lines)


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in docs.PAGES if (ROOT / "docs") in page.parents]
    assert len(pages) > 25
    there = {f"extend/{file.name}" for file in docs_pages.kind_pages()}  # the site's hook adds these
    assert [page for page in pages if page not in menu and page not in there] == []


def test_generated_pages_hold_every_flag_preset_and_field():
    table = docs_pages.config()
    fields = [field.path for group in kinds.field_groups() for field in group.fields]
    assert len(fields) > 80 and [field for field in fields if f"`{field}`" not in table] == []
    assert [flag for flag in FLAGS if f"`--{flag}`" not in docs_pages.flags()] == []
    said = docs_pages.presets()
    assert [name for name in presets() if name not in said] == []
    marks = {mark for page in docs.PAGES for mark in docs_pages.MARK.findall(docs.text(page))}
    assert marks == set(docs_pages.GENERATED)


def test_the_table_of_modes_names_the_flags_that_each_reads():
    rows = re.findall(
        r"^\| `--mode=(\w+)([^|]*)` ?[^|]*\|(.*)\|$", docs.text(ROOT / "docs/reference/command-line.md"), re.M
    )
    assert [mode for mode, *_ in rows] == list(MODES)
    for mode, command, _ in rows:
        named_here = set(re.findall(r"--(\w+)", command)) - {"config", "workdir"}
        assert named_here <= set(MODES[mode].flags), mode
