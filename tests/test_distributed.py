"""Which launchers are recognised, and which rows of a batch a process holds; real processes are in test_hosts.py."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from eim_jax.config import ConfigError
from eim_jax.parallel import processes
from eim_jax.parallel.sharding import make_mesh


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "gpu[01-02]"}, "SLURM"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "gpu01"}, ""),  # an interactive shell of one task
        ({"SLURM_NTASKS": "16"}, ""),  # the batch script itself, outside srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "a TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"MEGASCALE_NUM_SLICES": "2"}, "a TPU pod"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, "a Kubernetes job"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),  # a lone pod
    ],
)
def test_a_launcher_of_several_processes_is_recognised(environment, launcher):
    assert processes.detected({"JAX_PLATFORMS": "cpu", **environment}) == launcher


@pytest.mark.parametrize("given", [("host:1", None, None), ("", 2, 0), ("host:1", 2, None), ("", None, 1)])
def test_incomplete_flags_are_refused(given, monkeypatch):
    monkeypatch.setattr(processes, "detected", lambda: "")
    with pytest.raises(ConfigError, match="give all three"):
        processes.initialize(*given)


def test_a_process_alone_joins_nothing(monkeypatch):
    monkeypatch.setattr(processes, "detected", lambda: "")
    processes.initialize()
    processes.initialize("host:1", 1, 0)
    assert not jax.distributed.is_initialized()


def test_main_joins_before_any_device_is_touched():
    """Behind the flags an unreachable coordinator is the first thing that a run waits for."""
    code = (
        "import jax, eim_jax.main\n"
        "from eim_jax.parallel import processes\n"
        "def joined(*args):\n"
        "    jax.config.update('jax_num_cpu_devices', 3)\n"  # refused once the backend has started
        "    raise SystemExit('joined')\n"
        "processes.initialize = joined\n"
        "eim_jax.main.cli()\n"
    )
    command = [sys.executable, "-c", code, "--config=configs/miniature.py", "--workdir=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr.strip().endswith("joined"), done.stderr


class Places:
    """A mesh's rows as they lie on devices of several hosts: device i of the flat mesh belongs to hosts[i]."""

    def __init__(self, monkeypatch, shape, hosts, me):
        self.mesh = make_mesh(shape, jax.devices()[: len(hosts)])
        owner = dict(zip(self.mesh.devices.flat, hosts, strict=True))
        real = jax.sharding.NamedSharding

        class Sharding:
            def __init__(self, mesh, spec):
                self._places = real(mesh, spec)

            def devices_indices_map(self, shape):
                found = self._places.devices_indices_map(shape)
                return {SimpleNamespace(process_index=owner[d]): index for d, index in found.items()}

            def addressable_devices_indices_map(self, shape):
                return {d: i for d, i in self.devices_indices_map(shape).items() if d.process_index == me}

        class Device(SimpleNamespace):
            __hash__ = object.__hash__

        monkeypatch.setattr(processes, "NamedSharding", Sharding)
        monkeypatch.setattr(sys.modules[__name__], "SimpleNamespace", Device)
        monkeypatch.setattr(jax, "process_index", lambda: me)


@pytest.mark.parametrize(
    ("shape", "hosts", "parts", "rows"),
    [
        ((1, 8, 1), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 4), (1, 4), (2, 4), (3, 4)], [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ((2, 2, 2), [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # "tensor" over two hosts: both hold the same rows.
        ((1, 2, 4), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)], [range(4), range(4), range(4, 8)] * 2),
        # A ring through the pod's torus: a host's devices are no neighbours.
        ((1, 4, 1), [0, 1, 1, 0], [(0, 2), (1, 2)], [[0, 1, 6, 7], [2, 3, 4, 5]]),
    ],
    ids=["fsdp", "mixed", "tensor-over-hosts", "ring"],
)
def test_each_process_reads_the_rows_that_its_devices_hold(monkeypatch, shape, hosts, parts, rows):
    for me, part in enumerate(parts):
        with monkeypatch.context() as patch:
            mesh = Places(patch, shape, hosts, me).mesh
            assert processes.data_part(mesh) == part
    for me in range(2):
        with monkeypatch.context() as patch:
            mesh = Places(patch, shape, hosts, me).mesh
            np.testing.assert_array_equal(np.flatnonzero(processes.own_rows(mesh, 8)), list(rows[me]))


def test_unequal_parts_are_refused(monkeypatch):
    mesh = Places(monkeypatch, (1, 4, 1), [0, 0, 0, 1], 0).mesh
    with pytest.raises(ConfigError, match="unequal parts"):
        processes.data_part(mesh)


@pytest.mark.parametrize("count", [8, 5])
def test_rows_are_placed_and_fetched_whole(count):
    mesh = make_mesh((2, 2, 2))
    array = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    (placed,) = processes.place_rows(mesh, [array])
    assert placed.addressable_shards[0].data.shape == ((2, 3) if count == 8 else (5, 3))
    np.testing.assert_array_equal(processes.fetch(placed), array)
    assert processes.own_rows(mesh, count).all()
