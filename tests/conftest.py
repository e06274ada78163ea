"""Eight fake devices, strict ranks and run-time shape checks for every test."""

import pathlib

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Eight devices on two cores: programs in flight together can starve each other's collectives until XLA aborts.
jax.config.update("jax_cpu_enable_async_dispatch", False)

ROOT = pathlib.Path(__file__).resolve().parent.parent

_hook = install_import_hook("eim_jax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Drops compiled programs after each module: a worker that keeps thousands runs out of memory maps and crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data():
    """Returns a function: name of a folder of small real data beside the checkout -> its path, or a skipped test."""

    def find(name: str) -> pathlib.Path:
        path = ROOT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"no folder shared/data/{name} beside the checkout")
        return path

    return find
