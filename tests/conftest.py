"""Eight fake devices, strict ranks and run-time shape checks for every test."""

import functools
import gc
import os
import pathlib
import shutil
import tempfile

import jax
import pytest
from jaxtyping import install_import_hook
from shared_folders import shared

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Eight devices on two cores: programs in flight together can starve each other's collectives until XLA aborts.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Compiled programs are shared by the workers and by the processes that tests start, for this session: made once.
CACHE = "JAX_COMPILATION_CACHE_DIR"
LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_own_cache = None
if CACHE not in os.environ:  # set in the first process, inherited by the others
    _own_cache = os.environ[CACHE] = tempfile.mkdtemp(prefix="eim_jax_programs_")
os.environ.setdefault(LEAST, "0.1")
jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ[LEAST]))

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Shapes are checked at run time where they are stated. To wrap every function, of configs and texts as
# well, makes the suite much slower and checks no shape.
SHAPED = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "eim_jax").rglob("*.py"))
    if "jaxtyping" in file.read_text(encoding="utf-8")
]
_hook = install_import_hook(SHAPED, "beartype.beartype")


# Whole modules go to a worker (what a module sets up is set up once), those that take minutes first.
LONGEST = (
    "hosts resume mesh_numbers real_data experiments_page fuzz stages losses plan vlm answers gpt2 benchmarks train "
    "mesh_programs serve serve_refusals serve_command clip attention decode experiments xent weights_llama "
    "llama_adapters sharding quant"
)


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish(session):
    """What was imported stays: collections, frequent while JAX traces, need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_unconfigure(config):
    if _own_cache:
        shutil.rmtree(_own_cache, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def losses_of_one_module():
    """Takes out of the table what a module's config files put into it: another module's pages list what they find."""
    from eim_jax.config.tables import LOSSES  # here: behind the import hook

    before = set(LOSSES)
    yield
    for name in LOSSES.keys() - before:
        del LOSSES[name]


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Drops compiled programs after each module: a worker that keeps thousands runs out of memory maps and crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data():
    """Returns a function: name of a folder of small real data -> its path, or a skipped test."""
    return functools.partial(shared, "data")


@pytest.fixture(scope="session")
def shared_case():
    """Returns a function: name of a folder of small hard inputs -> its path, or a skipped test."""
    return functools.partial(shared, "cases")


@pytest.fixture(scope="session")
def shared_original():
    """Finds a folder of what the originals' own code gave by its name."""
    return functools.partial(shared, "originals")
