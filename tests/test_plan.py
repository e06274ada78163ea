"""A plan is the training step itself, its bytes are those of the arrays that training places."""

import dataclasses
import json
import pathlib

import jax
import mains
import pytest
from tiny import config_of

from eim_jax.config import ConfigError
from eim_jax.losses import queue_build
from eim_jax.losses.key_sources import LM_TEXTS
from eim_jax.losses.table import queues_of
from eim_jax.parallel.sharding import make_mesh
from eim_jax.planning import gpus, meshes, plan, targets
from eim_jax.planning.shapes import abstract_inputs, queue_encoder
from eim_jax.planning.table import sharding_table
from eim_jax.training import arm_model, assembly
from eim_jax.training import setup as loading
from eim_jax.training import stage as one_stage
from eim_jax.training.arm import plan_arm, resolved, run_arm
from eim_jax.training.partition import groups

ROOT = pathlib.Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"
GIB = targets.GIB


def program_of(config, arm, devices, samples=0, **kwargs):
    """(inputs, program) of the arm's first stage."""
    inputs, _ = abstract_inputs(config, make_mesh(config.mesh, devices), samples, **kwargs)
    vlm = arm_model.model(inputs, config.arm[arm])
    params = plan.placed(arm_model.shapes(inputs, config.arm[arm], vlm), inputs.mesh)
    info = plan_arm(inputs, arm)[0]
    return inputs, plan.stage_program(inputs, vlm, resolved(config.stages[info.name], inputs), params, info.steps)


class Stopped(Exception):
    """Training got to its step."""


@pytest.mark.parametrize(
    ("name", "sequence"),
    [("miniature", ("ie",)), ("miniature_lavin", ("adapter", "ie"))],
    ids=["GPT-2, images", "LLaMA, features"],
)
def test_planned_arguments_are_those_that_training_passes_to_its_step(name, sequence, tmp_path, monkeypatch):
    """Same tree, shapes, dtypes, places; so the planned bytes are the bytes of the arrays on each device."""
    changes = {"data.scenes": 24, "mesh": (2, 2, 2), "arms": ("eim",), "arm.eim.sequence": sequence}
    for stage in sequence:
        short = {"steps": 2, "warmup_epochs": 0.0, "warmup_steps": 1, "batch": 8}
        changes |= {f"stages.{stage}.{field}": value for field, value in short.items()}
    config = config_of(name, **changes)
    caught = []

    class Step:
        def trace(self, *arguments):
            caught.extend(arguments)
            raise Stopped

    assemble = assembly.assemble
    monkeypatch.setattr(one_stage, "assemble", lambda *args: assemble(*args)._replace(step=Step()))
    built, encoder = [], queue_build.encoder

    def recording(*args):
        rows, step = encoder(*args)
        return rows, lambda *arguments: built.append(jax.eval_shape(lambda *x: x, *arguments)) or step(*arguments)

    monkeypatch.setattr(queue_build, "encoder", recording)
    inputs = loading.load(config, tmp_path)
    with pytest.raises(Stopped):
        run_arm(inputs, "eim")
    longest = caught[3].valid.shape[1]  # a plan is for texts of max_tokens, data may hold shorter ones alone
    assert longest <= config.data.max_tokens
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens=longest))
    planned_inputs, program = program_of(config, "eim", jax.devices(), samples=len(inputs.train))
    real, planned = caught[:5], program.arguments[:5]
    assert jax.tree.structure(planned) == jax.tree.structure(tuple(real))
    for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, len(one.shape)), (one, other.sharding)
    here = jax.devices()[3]
    arrays = jax.tree.leaves(real)
    placed = sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == here)
    assert plan.local_bytes(planned) == placed
    for kind, real in zip(queues_of(config.stages[sequence[0]]), built, strict=True):
        vlm = arm_model.model(planned_inputs, config.arm["eim"])
        _, planned = queue_encoder(planned_inputs, vlm, kind, plan.placed(planned_inputs.towers, planned_inputs.mesh))
        assert kind.source is not LM_TEXTS or planned[2][0].shape[2] == longest
        planned = (planned[0], planned[1], real[2], *planned[3:])  # the texts of CLIP are shorter than its context
        assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(lambda x: (x.shape, x.dtype), real)


def test_a_plan_on_eight_cpu_devices_adds_up(monkeypatch):
    """One stage of the miniature, compiled: parameters, Adam and queue by hand; the peak is the sum of the parts."""
    changes = {"data.scenes": 24, "arms": ("eim",), "arm.eim.sequence": ("st",), "arm.eim.prompts": 0}
    changes |= {"stages.st.batch": 8, "stages.st.warmup_steps": 5, "data.pack": "auto"}
    config = config_of("miniature", **changes)
    (found,), notes = plan.plan(config, targets.target("cpu:8"), samples=100)
    assert any("packed (config.data.pack) they take fewer slots" in note for note in notes)
    inputs, _ = abstract_inputs(config, make_mesh(config.mesh, jax.devices()))
    arm = config.arm["eim"]
    shapes = arm_model.shapes(inputs, arm, arm_model.model(inputs, arm))
    paths = groups(config.stages["st"], shapes)[0].paths
    st = plan.local_bytes({p: x for p, x in plan.placed(shapes, inputs.mesh).items() if p in paths})
    assert found.memory.trained == found.memory.kept == st > 0
    assert 2 * st <= found.memory.optimizer <= 2 * st + 64  # two moments, and counters
    width = inputs.lm.config.width
    assert found.memory.queue == (width * 4 + 4) * 104 // 8  # 100 rows filled up to 8 x 13, float32, and their groups
    assert found.memory.peak == sum(found.memory) and found.memory.temporaries > 0
    (build,) = found.builds
    assert (build.queue, build.rows, build.fits) == ("K_e", 13, True)
    texts = 13 * (config.data.max_tokens * width) * 4  # embeddings of a step's texts, of which XLA may keep a part
    assert build.peak - build.temporaries == sum(found.memory[:2]) + found.memory.queue + found.memory.kept
    assert 0 < build.temporaries < 10 * texts
    assert found.fits and found.knob == ""
    assert found.steps_per_epoch == 100 // 8
    assert found.expected == max(found.seconds.values())  # a CPU's rates are assumed as they stand
    assert found.epoch_seconds == found.step_seconds * 12 == max(found.seconds.values()) * 12
    small = dataclasses.replace(targets.target("cpu:8").chip, memory=found.memory.peak)
    (tight,), _ = plan.plan(config, targets.target("cpu:8")._replace(chip=small), samples=100)
    assert not tight.fits and tight.knob
    monkeypatch.setattr(plan, "_encoder_temporaries", lambda *_: (2**50, True))  # as of a huge text tower
    (short,), _ = plan.plan(config, targets.target("cpu:8"), samples=100)
    assert not short.fits and short.knob and "building K_e, 13 rows at a time" in short.notes[-1]


def test_frozen_leaves_are_on_the_devices_once(tmp_path):
    """What no stage trains is loaded in the compute dtype and shared by the arm: no float32 copy beside it."""
    config = config_of("miniature_lavin", **{"arms": ("eim",), "towers.dtype": "bfloat16"})
    inputs = loading.load(config, tmp_path, data=False)
    _, params = arm_model.start(inputs, config.arm["eim"])
    floats = {
        path: leaf for path, leaf in inputs.towers.items() if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
    }
    assert {leaf.dtype.name for leaf in floats.values()} == {"bfloat16"}
    for path, leaf in floats.items():
        pair = (leaf, params[path])
        assert len({x.addressable_shards[0].data.unsafe_buffer_pointer() for x in pair}) == 1, path
    trained = config_of("miniature", **{"arms": ("eim",), "towers.dtype": "bfloat16"})
    towers = loading.load(trained, tmp_path, data=False).towers
    assert {leaf.dtype.name for path, leaf in towers.items() if path.startswith("lm/")} == {"float32"}


def memory(**parts):
    return plan.Memory(**{**dict.fromkeys(plan.Memory._fields, 1), **parts})


def knob_for(part, name="lavin7b_scienceqa", **changes):
    config = config_of(name, **changes)
    inputs, _ = abstract_inputs(config, make_mesh(config.mesh, jax.devices()), platform="tpu")
    return plan.knob(inputs, "base", config.stages["base"], memory(**{part: 9}))


def test_the_first_knob_is_that_of_the_largest_part():
    assert knob_for("frozen") == "--config.towers.quant=nf4"
    assert knob_for("frozen", mesh=(8, 1, 1)).startswith('--config.mesh="(1,-1,1)"')
    assert knob_for("frozen", **{"towers.quant": "nf4"}).startswith("more devices")
    assert knob_for("temporaries") == "--config.stages.base.accumulate=2"
    assert knob_for("temporaries", **{"towers.remat": "none"}) == "--config.towers.remat=full"
    assert knob_for("temporaries", **{"stages.base.accumulate": 4}).startswith("more devices")
    assert knob_for("queue") == "--config.losses.queue_dtype=int8"
    assert knob_for("queue", **{"losses.queue_dtype": "int8"}).startswith("more devices")
    assert knob_for("optimizer", "clipcap_small_coco").startswith("more devices")


def test_full_size_arguments_are_hand_arithmetic():
    """ClipCap-EIM, ST stage, bfloat16 on 8: 4,722,432 in float32 with two moments, K_e 566,747 x 768."""
    config = config_of("clipcap_eim_coco")
    _, program = program_of(config, "eim", jax.devices(), platform="tpu")
    trained, state, frozen, batch, queues = program.arguments[:5]
    vectors = (3072 + 768) * 4  # the biases are whole on every device
    assert plan.local_bytes(trained) == (4_722_432 * 4 - vectors) // 8 + vectors
    assert sum(x.size * x.dtype.itemsize for x in frozen.values()) == 2 * (124_439_808 + 151_277_312 + 26_070_528) + (
        2 * (124_439_808 + 26_070_528)  # what a later stage trains is held in float32 from the start
    )
    assert plan.local_bytes(queues) == 70_844 * (768 * 2 + 4)  # 566,752 rows over 8
    small = program_of(config_of("clipcap_eim_coco", **{"losses.queue_dtype": "int8"}), "eim", jax.devices())[1]
    assert plan.local_bytes(small.arguments[4]) == 70_844 * (768 + 4 + 4)  # codes, a scale and a group a row
    assert batch.features.shape == (40, 50, 768) and batch.image is None
    assert plan.local_bytes(state) >= 2 * plan.local_bytes(trained)


def test_lavins_marker_tokens_and_queue_are_planned_without_its_tokenizer():
    config = config_of("lavin7b_eim_scienceqa")
    inputs, program = program_of(config, "eim", jax.devices(), platform="tpu")
    vlm = arm_model.model(inputs, config.arm["eim"])
    assert (vlm.bos, len(vlm.with_image), len(vlm.without_image)) == (1, 3, 5)
    assert program.arguments[4]["embed"].keys.shape == (12_728, 4096)


def test_a_tower_of_unknown_size_is_refused_by_name():
    config = config_of("clipcap_small_coco", **{"towers.lm": "someone/some-model"})
    with pytest.raises(ConfigError, match=r"config\.towers\.lm=someone/some-model: .*give a directory"):
        abstract_inputs(config, make_mesh())


def test_the_compilers_refusal_is_read():
    text = "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total (22.51G) exceeds available HBM (15.75G)."
    assert plan.out_of_memory(text) == int(22.51 * GIB)
    assert plan.out_of_memory("RESOURCE_EXHAUSTED: no number") == 0
    assert plan.out_of_memory("INVALID_ARGUMENT: something else") is None


TABLES = [
    ("clipcap_eim_coco", (1, 8, 1)),
    ("clipcap_eim_coco", (2, 2, 2)),
    ("lavin7b_eim_scienceqa", (1, 8, 1)),
    ("lavin7b_eim_scienceqa", (1, 4, 2)),
]


@pytest.mark.parametrize(("name", "mesh"), TABLES)
def test_sharding_table_is_the_golden_one(name, mesh):
    """Written anew by: python -m tests.test_plan"""
    golden = GOLDENS / f"sharding_{name}_{'x'.join(map(str, mesh))}.txt"
    assert golden.read_text().splitlines() == table_lines(name, mesh)


def table_lines(name, mesh):
    config = config_of(name, **{"mesh": mesh, "towers.dtype": "bfloat16"})
    return sharding_table(config, jax.devices()[:8], "eim", "tpu")


def test_plan_is_a_command_that_needs_no_workdir(tmp_path):
    """On fake H100s that are not there, with only the smallest stage left to compile, on either mesh of two."""
    command = ["--mode=plan", "--config=configs/miniature.py"]
    command += ["--topology=gpu:h100x2", "--config.arms=('eim',)", "--config.arm.eim.sequence=('st',)"]
    command += ["--config.arm.eim.prompts=0", "--config.stages.st.batch=16", "--meshes"]
    out = tmp_path / "out"
    out.mkdir()
    code, said = mains.run([*command, f"--out={out}/plan.json"], tmp_path / "said.txt")
    assert code == 0, said
    assert "expected at 50% of the arithmetic's, 80% of the memory's and 80% of the links' peak" in said
    assert "2 x H100 SXM" in said and ("fake CPU devices stand in" in said or gpus.has_gpu_compiler())
    assert "| eim | st " in said and "fits" in said
    lines = {mesh: line.split("|") for line in said.splitlines() if (mesh := line[2:11]) in ("(2, 1, 1)", "(1, 2, 1)")}
    assert len(lines) == 2 and all(float(columns[3].replace(",", "")) > 0 for columns in lines.values())
    least = min(lines, key=lambda mesh: float(lines[mesh][3].replace(",", "")))
    assert f'Recommended: --config.mesh="{least.replace(" ", "")}"' in said
    written = json.loads((out / "plan.json").read_text())
    assert written["mesh"] == [int(n) for n in least[1:-1].split(",")]
    (stage,) = written["stages"]
    shares = {"compute": 0.5, "memory": 0.8, "links": 0.8}
    assert stage["expected"] == max(stage["seconds"][rate] / share for rate, share in shares.items()) > 0
    code, said = mains.run([*command, "--topology=h100x16"], tmp_path / "said.txt")
    assert code != 0 and "no such topology. Valid: v5e" in said
    assert list(out.iterdir()) == [out / "plan.json"]


def test_the_recommended_mesh_sends_least_of_those_that_fit():
    """Bytes of a step times its steps, over the stages; one stage that does not fit is enough against a mesh."""

    def stage(sent, steps, fits=True, peak=1):
        sent = {"all-gather": sent, "all-reduce": 1.0}
        return plan.StagePlan("eim", "st", memory(frozen=peak), 0, fits, "", 1.0, sent, {}, 0.0, 1, steps, ())

    few = meshes.MeshPlan((8, 1, 1), (stage(1.0, 10), stage(1.0, 10, fits=False)))
    some = meshes.MeshPlan((2, 4, 1), (stage(9.0, 10), stage(3.0, 5, peak=50)))
    many = meshes.MeshPlan((1, 8, 1), (stage(9.0, 10), stage(4.0, 5)))
    assert (some.sent, some.peak) == (10 * 10 + 4 * 5, 50 + 6)
    assert meshes.best([few, some, many]) is some
    assert meshes.best([few]) is None
    assert meshes.candidates(12) == [(12, 1, 1), (6, 2, 1), (4, 3, 1), (3, 4, 1), (2, 6, 1), (1, 12, 1)]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for name, mesh in TABLES:
        lines = table_lines(name, mesh)
        (GOLDENS / f"sharding_{name}_{'x'.join(map(str, mesh))}.txt").write_text("\n".join(lines) + "\n")
