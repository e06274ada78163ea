"""`--mode=prepare`: a data set's images, small and in a few large files."""

from pathlib import Path

from eim_jax.config import Config
from eim_jax.data import shard_writer


def prepare(config: Config, out: Path) -> None:
    """Writes a data set's shards into the folder `out`: no model, no work directory, no device."""
    shard_writer.prepare(config, out)
