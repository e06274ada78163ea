"""Several processes, one a host or one an accelerator, that run the same program on one mesh over all their devices.

`initialize` joins them, before anything touches a device. Behind it, parameters, batches and queues are global arrays;
files are written by process 0 alone, except checkpoints and queues, of which each process writes what it holds.
"""

import itertools
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eim_jax.config import ConfigError
from eim_jax.parallel.sharding import ROWS, parts_of

HEARTBEAT = 60  # seconds without a sign of life after which a process counts as lost, and all others end

_WAIT = 24 * 3600  # of a barrier: one process may read for hours; that a process is dead shows by its heartbeat
_barriers = itertools.count()
_watcher: subprocess.Popen | None = None


def initialize(
    coordinator: str = "", num_processes: int | None = None, process_id: int | None = None, heartbeat: int = HEARTBEAT
) -> None:
    """Joins the run's processes; alone, without a launcher and without flags, does nothing.

    SLURM, Open MPI, Kubernetes Jobs and JobSets, and TPU pods are recognised by `jax.distributed.initialize`. Elsewhere
    give all three: `coordinator` = host:port of process 0, their number, and this one's place. Process 0 then listens
    at that address alone. A process that is lost
    (killed, its host gone) ends all others within `heartbeat` seconds. Raises ConfigError for flags that are
    incomplete, and where a launcher is seen but its processes cannot be told.
    """
    given = (coordinator, num_processes, process_id)
    launcher = detected()
    if num_processes == 1 or (not launcher and given == ("", None, None)):
        return
    if not launcher and (not coordinator or num_processes is None or process_id is None):
        raise ConfigError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: without SLURM, "
            "Open MPI, Kubernetes or a TPU pod give all three, on every process"
        )
    # Signals (parallel/signals.py) handles SIGTERM itself: JAX's service would take it over for good.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator or None,
            num_processes,
            process_id,
            coordinator_bind_address=_bind_address(coordinator),
            heartbeat_timeout_seconds=heartbeat,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the processes of this run could not be told from {launcher or 'the flags'} ({error}): give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I on every process, --num_processes=1 to one alone"
        ) from error
    if jax.process_count() == 1:
        return
    _watch()
    _name_warnings()
    from eim_jax.utils.console import console  # here, so that queues alone need no rich

    console.quiet = not is_first()  # one process speaks for all; errors and warnings come from each
    console.print(f"{jax.process_count()} processes, {jax.device_count()} devices", soft_wrap=True)


def _bind_address(coordinator: str) -> str | None:
    """Where process 0 listens: at the address given; None, on all of the host's, where that would shut others out."""
    host, _, port = coordinator.rpartition(":")
    if not host:
        return None
    try:
        address = socket.gethostbyname(host.strip("[]"))
        with socket.socket() as own:
            own.bind((address, 0))
    except OSError:  # another host's address, one behind a router, or IPv6 alone
        return None
    # Debian's /etc/hosts gives the host's own name a loopback address, which no other host can reach.
    named = address.startswith("127.") and host not in ("localhost", address)
    return None if named else f"{address}:{port}"


def detected(environment=os.environ) -> str:
    """The launcher whose several processes this one belongs to, "" for none."""

    def several(name):
        return int(environment.get(name) or 1) > 1

    if several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment:
        return "SLURM"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or several("MEGASCALE_NUM_SLICES"):
        return "a TPU pod"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "a Kubernetes job"
    # On a TPU VM only the machine's metadata tell of other hosts; JAX reads them.
    asks = "TPU_SKIP_MDS_QUERY" not in environment and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return "a TPU VM" if asks and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()) else ""


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # here, because modes of one process start faster without it

        name = f"eim {next(_barriers)} {what}"  # a name serves once
        ocp.multihost.sync_global_processes(name, timeout=_WAIT, processes=set(range(jax.process_count())))


def agreed(value: int) -> int:
    """Process 0's value, on every process; waits for process 0."""
    if jax.process_count() == 1:
        return value
    barrier("value")  # here a process may wait for long, in a collective of the devices it may not
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


@contextmanager
def first_alone(what: str) -> Iterator[None]:
    """Runs the body on process 0, then on the others, which find the caches that it wrote; all leave together."""
    if not is_first():
        barrier(what)
    yield
    if is_first():
        barrier(what)
    barrier(f"{what} on all")


def data_part(mesh: Mesh) -> tuple[int, int]:
    """(i, n): of a batch cut into n equal parts, the devices of this process hold the i-th.

    Processes that share their rows (an axis "tensor" across hosts) have the same i. Raises ConfigError where processes
    hold unequal or overlapping parts.
    """
    parts = parts_of(mesh)
    places = NamedSharding(mesh, PartitionSpec(ROWS)).devices_indices_map((parts,))
    held: dict[int, set[int]] = {}
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).add(rows.indices(parts)[0])
    sets = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(len(rows) for rows in sets) != parts or len({len(rows) for rows in sets}) != 1:
        raise ConfigError(f"config.mesh: {dict(mesh.shape)} gives the processes unequal parts of a batch: {sets}")
    return sets.index(tuple(sorted(held[jax.process_index()]))), len(sets)


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's `rows` the devices of this process hold, bool[rows]; all where they are not split."""
    parts = parts_of(mesh)
    own = np.zeros(rows, bool)
    if rows % parts:
        return ~own
    for (part,) in NamedSharding(mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((rows,)).values():
        own[part] = True
    return own


def place_rows(mesh: Mesh, arrays: Sequence[np.ndarray]) -> list[jax.Array]:
    """Arrays of as many rows, of which each process needs to know its own only, with rows split over the data axes.

    Where the rows do not divide, every device holds all.
    """
    parts = parts_of(mesh)
    placed = []
    for array in arrays:
        array = np.asarray(array)
        sharding = NamedSharding(mesh, PartitionSpec(None if len(array) % parts else ROWS))
        placed.append(jax.make_array_from_callback(array.shape, sharding, array.__getitem__))
    return placed


def fetch(tree):
    """The whole arrays as NumPy's, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def one(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def finish() -> None:
    """Ends a process whose work is done, when all have come here."""
    if jax.distributed.is_initialized():
        barrier("end")
        jax.distributed.shutdown()
    _farewell()


def leave(code: int) -> None:
    """Ends this process after an error of its own; the others, which may wait for it, end by its missing heartbeat."""
    if jax.distributed.is_initialized():
        _farewell()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an ordinary exit would wait minutes for processes that wait for this one


def named(message: str) -> str:
    """The message, with which process it comes from where there are several."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return f"process {jax.process_index()} of {jax.process_count()}: {message}" if several else message


def _watch() -> None:
    """Starts a shell that says what happened if this process ends without a word: JAX aborts it in C++."""
    global _watcher
    words = named(
        "ended without a word. Either it was killed (memory? preemption?), or JAX ended it because another process was "
        "lost: then the lines above name that task. The same command, on every host, continues from the last checkpoint"
    )
    _watcher = subprocess.Popen(
        ["/bin/sh", "-c", 'trap "" INT TERM; read -r word || echo "error: $0" >&2', words],
        stdin=subprocess.PIPE,
        close_fds=True,
    )


def _farewell() -> None:
    if _watcher is not None and _watcher.stdin and not _watcher.stdin.closed:
        _watcher.stdin.write(b"end\n")
        _watcher.stdin.close()


def _name_warnings() -> None:
    from absl import logging  # here, so that queues alone need no absl

    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: named(plain(*args, **options))
    form = logging.PythonFormatter()
    place = f"process {jax.process_index()}: "
    logging.get_absl_handler().python_handler.formatter = form
    plain_form = form.format
    form.format = lambda record: place + plain_form(record)
