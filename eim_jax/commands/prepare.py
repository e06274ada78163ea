"""`--mode=prepare`: a data set's images, small and in a few large files."""

from pathlib import Path

from eim_jax.config import Config
from eim_jax.data import shard_writer
from eim_jax.parallel.lock import held


def prepare(config: Config, out: Path) -> None:
    """Writes a data set's shards into the folder `out`: no model, no work directory, no device.

    Raises:
      InUse: another command writes there.
    """
    with held(out, wait=False):
        shard_writer.prepare(config, out)
