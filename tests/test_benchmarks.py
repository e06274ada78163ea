"""The benchmarks' own arithmetic, and gpu.py from its command line to its files in the small form."""

import argparse
import ast
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from eim_jax.parallel import chips
from eim_jax.utils import flops

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
try:
    import clipcap_case
    import gpu
    import gpu_rows
    import growth
    import lavin_case
    import llama_case
    import overhead
    import step_case
finally:
    sys.path.pop(0)

# What a machine with JAX, Flax and Optax may lack; without PyTorch the other side's columns stay empty.
BARE = """
import importlib.util, sys
ABSENT = {"grain", "ml_collections", "tensorboardX", "tensorflow_datasets", "nltk", "torch"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec  # which gives None for what is not there
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in ABSENT else found(name, package)
"""


@pytest.mark.parametrize(
    "path", sorted([*FOLDER.glob("*.py"), *FOLDER.parent.glob("scripts/*.py")]), ids=lambda p: p.name
)
def test_what_benchmarks_and_scripts_take_from_the_package_is_there(path):
    taken = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in (node for node in taken if node.module.split(".")[0] in ("eim_jax", "configs", "experiments")):
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}"), name


@pytest.mark.exhaustive
def test_gpu_benchmark_runs_on_a_machine_with_neither_data_packages_nor_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    paths = os.pathsep.join([str(tmp_path), str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(FOLDER / "gpu.py"), "--size=tiny", "--minutes=40", f"--out={tmp_path / 'gpu.json'}"]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["status"] for name, part in record["sections"].items()} == dict.fromkeys(gpu.SECTIONS, "done")
    found = [row["section"] for row in record["rows"]]
    assert {name: found.count(name) for name in gpu.SECTIONS} == {
        "rates": 1, "queue": 4, "clipcap": 3, "decode": 2, "lavin": 3, "lavin_torch": 0,
    }  # fmt: skip
    for row in record["rows"][1:]:
        assert row["ours"]["seconds"] > 0 and not row["torch"] and row.get("target") is None, row["case"]
    table = (tmp_path / "gpu.md").read_text()
    assert "PyTorch's columns are empty: not there: No module named 'torch'" in table
    assert all(f"| {row['section']}: {row['case']} |" in table for row in record["rows"][1:])
    assert table in ended.stdout


def _benchmark(tmp_path, monkeypatch, tell, *options):
    """A Benchmark whose sections' process is `tell(take, section)`."""

    def process(self, group):
        tell(self._take, group[0])
        return group[1:]

    monkeypatch.setattr(gpu.Benchmark, "_process", process)
    return gpu.main([f"--out={tmp_path / 'gpu.json'}", *options])


def _row(section, milliseconds):
    return {"section": section, "case": "one", "ours": {"seconds": milliseconds / 1e3, "samples_per_s": 1.0}}


def _told(take, section, milliseconds):
    take({"section": section, "status": "done"})
    rates = {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e9}
    take({"section": section, "case": "rates", "ours": rates} if section == "rates" else _row(section, milliseconds))


def test_a_section_that_is_run_again_replaces_its_own_rows_alone(tmp_path, monkeypatch):
    _benchmark(tmp_path, monkeypatch, lambda take, section: _told(take, section, 1))
    record = _benchmark(tmp_path, monkeypatch, lambda take, section: _told(take, section, 2), "--only", "queue")
    assert record == json.loads((tmp_path / "gpu.json").read_text())
    times = {row["section"]: row["ours"].get("seconds") for row in record["rows"]}
    assert times == {name: None if name == "rates" else 0.002 if name == "queue" else 0.001 for name in gpu.SECTIONS}
    assert len(record["commands"]) == 2


def test_what_has_no_time_left_is_recorded_as_not_run(tmp_path, monkeypatch):
    record = _benchmark(tmp_path, monkeypatch, lambda take, section: _told(take, section, 1), "--minutes=0.01")
    assert {part["status"] for part in record["sections"].values()} == {"not run: the time was up"}
    assert "Section clipcap: not run: the time was up." in (tmp_path / "gpu.md").read_text()


def test_a_process_that_dies_costs_its_own_section_alone(tmp_path, monkeypatch):
    def child(command, **_):
        sections = json.loads(command[-1])["sections"]
        lines = [{"section": sections[0], "status": "running"}]
        if sections[0] != "queue":
            lines += [_row(sections[0], 1), {"section": sections[0], "status": "done"}]
            lines[1] |= (
                {"ours": {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e9}} if sections[0] == "rates" else {}
            )
        text = "".join(f"{gpu.MARK}{json.dumps(line)}\n" for line in lines)
        code = f"import os\nprint({text!r}, end='', flush=True)\nos._exit({0 if len(lines) > 1 else 7})"
        return Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    Popen = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", child)
    record = gpu.main([f"--out={tmp_path / 'gpu.json'}"])
    status = {name: part["status"] for name, part in record["sections"].items()}
    assert status.pop("queue") == "its process ended with 7; its rows up to then are kept"
    assert set(status.values()) == {"done"}


@pytest.mark.parametrize("stage", clipcap_case.STAGES)
def test_counted_arithmetic_of_clipcaps_stages_is_xlas(stage):
    tiny = clipcap_case.SIZES["tiny"]
    wide = dataclasses.replace(tiny.visual, width=256, mlp=1024)
    size = tiny._replace(visual=wide, lm=dataclasses.replace(tiny.lm, width=256), prompt_hidden=64, samples=16)
    case = clipcap_case.clipcap_case(size, stage, batch=8, dtype="float32", dropout=0.0)
    made, _, sizes = step_case.compiled(case)
    assert sizes["aliased"] >= step_case.nbytes(case.arguments[0])  # the trained leaves are donated
    # Norms, softmax, AdamW and the 16 keys are left out: several per cent at this width.
    assert clipcap_case.flops(case) == pytest.approx(made.cost_analysis()["flops"], rel=0.1)


@pytest.mark.parametrize("recipe", overhead.RECIPES)
def test_no_stage_computes_what_its_losses_do_not_need(recipe):
    """Of the full-size configs, from the traced steps: frozen CLIP is cached, CLIP.text is in no step."""
    rows = {row["stage"]: row for row in overhead.stage_rows(overhead.RECIPES[recipe][1])}
    assert rows["st"]["towers"] == ["st"]  # neither LM nor vision
    assert rows["lm"]["towers"] == ["lm"] and not {"image", "features"} & set(rows["lm"]["reads"])
    assert all("text" not in row["towers"] for row in rows.values())
    for name, row in rows.items():
        assert ("image" in row["reads"]) == (name == "ie")  # only there CLIP changes
    assert rows["ie"]["towers"] == ["visual", "st", "lm"]
    if "adapter" in rows:
        assert rows["adapter"]["towers"] == ["st", "lm"]
    assert rows["st"]["flops"] < 0.05 * rows["ie"]["flops"]


def _recomputed(make):
    """What "dots" and "full" add to the arithmetic of a step that recomputes nothing."""
    counted = [flops.work(case.step.trace(*case.arguments).jaxpr).flops for case in map(make, ("none", "dots", "full"))]
    return counted[1] - counted[0], counted[2] - counted[0]


@pytest.mark.parametrize(("stage", "images"), [("lm", False), ("ie", True)])
def test_recomputing_all_but_products_leaves_clipcap_attentions_alone(stage, images):
    """4 b t^2 width a layer for q k^T and for the mix; of a tower whose kernels are frozen nothing needs the mix."""
    size = clipcap_case.SIZES["tiny"]

    def make(remat):
        towers = {part: dataclasses.replace(getattr(size, part), remat=remat) for part in ("lm", "visual")}
        return clipcap_case.clipcap_case(size._replace(**towers), stage, batch=4, dtype="float32")

    lm, visual = size.lm, size.visual
    slots = size.length + (visual.tokens if images else 0)
    scores = 4 * 4 * slots**2 * lm.width * lm.layers
    if images:
        scores += 2 * 4 * visual.tokens * (visual.tokens + 10) * visual.width * visual.layers
    dots, full = _recomputed(make)
    assert dots == pytest.approx(scores, rel=0.02)
    assert full > 5 * dots


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_recomputing_all_but_products_leaves_llamas_attention_alone(quant):
    size = lavin_case.SIZES["tiny"]
    form = {"quant": quant, "batch": 2, "accumulate": 1, "dtype": "float32"}
    dots, full = _recomputed(lambda remat: lavin_case.lavin_case(size, "lm", **form, remat=remat))
    assert dots == pytest.approx(4 * 2 * size.length**2 * size.lm.width * size.lm.layers / 2, rel=0.01)
    assert full > 5 * dots


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        # Embedding, norms, and a layer's q and o, k and v, MLP and norms.
        ("full", 512 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)),
        ("lora", 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))),
        ("llama_adapter", 2 * (10 * 64 + 4)),
    ],
)
def test_a_llamas_step_trains_what_its_kind_says(kind, counted):
    case = llama_case.llama_case(llama_case.SIZES["tiny"], kind, batch=2, text=16)
    trained = {path: leaf.size for path, leaf in case.arguments[0].items()}
    assert sum(size for path, size in trained.items() if path.startswith("lm/")) == counted
    assert sum(trained.values()) > counted  # the ST


def test_what_is_expected_of_a_step_is_the_slowest_rate_over_its_share():
    """ClipCap's ST stage on one H100, by hand: its bytes over 0.8 of 3,350 GB/s, since it computes next to nothing."""
    case = clipcap_case.clipcap_case(clipcap_case.SIZES["tiny"], "st", batch=4, dtype="float32")
    done = flops.work(case.step.trace(*case.arguments).jaxpr)
    state = 3 * step_case.nbytes(case.arguments[0]) + 2 * step_case.nbytes(case.arguments[1])
    found = gpu_rows.expected_of(case, chips.CHIPS["h100"], "cuda")
    assert found == pytest.approx((done.bytes + state) / 3350e9 / 0.8)
    slow = dataclasses.replace(chips.CHIPS["h100"], flops=1e6)
    assert gpu_rows.expected_of(case, slow, "cuda") == pytest.approx(done.flops / 1e6 / 0.5)
    assert gpu_rows.expected_of(case, slow, "tpu") == pytest.approx(done.flops / 1e6 / 0.6)


def test_a_slope_is_the_exponent_of_growth():
    curve = growth.Curve("a step", "keys", "ms", (10, 20, 80), (3.0, 12.0, 12.0))
    assert curve.slopes == pytest.approx([2.0, 0.0])
    assert growth.table(curve).splitlines()[2] == "| keys | 3 | 12 (2.00) | 12 (0.00) |"


def test_temporaries_of_a_compiled_step_grow_with_its_rows():
    options = argparse.Namespace(size="tiny", rounds=1)
    _, memory = growth.steps("rows", (8, 16), options, lambda n: {"batch": n})
    assert 0.7 < memory.slopes[0] < 1.3
    assert f"{memory.y[1]:.3g} at 16" in growth.drawn([memory])
