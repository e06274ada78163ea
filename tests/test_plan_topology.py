"""Full-size stages compiled by libtpu for TPUs that are not here: python -m pytest -n 0 -m "topology and not slow"."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from eim_jax.config import ConfigError, from_config_dict
from eim_jax.planning import plan, targets

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
MISSING = "libtpu is not installed (pip install libtpu): nothing here compiles for TPUs"
QUICK = ("clipcap_small_coco", "llama_adapter_scienceqa", "lavin7b_scienceqa")  # one a recipe; the others are slow
CASES = [pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.slow) for name in targets.SMALLEST]
needs_libtpu = pytest.mark.skipif(not targets.has_libtpu(), reason=MISSING)


def test_every_full_size_config_states_its_smallest_topology():
    full = {f.stem for f in CONFIGS.glob("*.py")} - {"__init__", "base", "vqa"}
    assert {name for name in full if not name.startswith(("miniature", "photos"))} == set(targets.SMALLEST)


@pytest.mark.topology
@pytest.mark.timeout(1800)
@needs_libtpu
@pytest.mark.parametrize("name", CASES)
def test_the_heaviest_stage_fits_the_smallest_topology(name):
    topology, stage = targets.SMALLEST[name]
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    target = targets.target(topology)
    assert target.exact and {device.platform for device in target.devices} == {"tpu"}
    (found,), _ = plan.plan(config, target, only=(stage,))
    assert found.fits, f"{found.memory}: {found.knob}"
    assert found.memory.frozen + found.memory.trained < found.memory.peak <= plan.USABLE * target.chip.memory
    assert len(target.devices) == 1 or sum(found.sent.values()) > 0


@pytest.mark.topology
@needs_libtpu
def test_libtpus_own_refusal_of_a_topology_lists_the_valid_ones():
    with pytest.raises(ConfigError, match=r"--topology=v5e:3x3: .*Valid: v5e: or v6e:"):
        targets.target("v5e:3x3")


@pytest.mark.topology
@needs_libtpu
@pytest.mark.parametrize(("topology", "devices"), [("v4:2x2x1", 4), ("v5p:2x2x2", 8), ("v6e:4x4", 16), ("v5e:1x1", 1)])
def test_a_topologys_devices_are_its_chips(topology, devices):
    assert len(targets.target(topology).devices) == devices == targets.parse(topology)[2]


@pytest.mark.topology
@needs_libtpu
def test_a_program_beyond_the_chips_memory_is_refused_with_its_size():
    """Arguments of 17.5 GiB on a chip of 16: the refusal's own figure is read."""
    there = jax.sharding.SingleDeviceSharding(targets.target("v5e:1x1").devices[0])
    x = jax.ShapeDtypeStruct((4_600_000, 1024), jnp.float32, sharding=there)
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        jax.jit(lambda x: x.sum()).lower(x).compile()
    assert plan.out_of_memory(str(refusal.value)) == pytest.approx(x.size * 4, rel=0.01)
