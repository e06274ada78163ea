"""What a config asks of the kinds: names that are in their tables, fields that they take."""

from typing import TYPE_CHECKING

from eim_jax.config import Config, conversion, resume
from eim_jax.data import datasets

if TYPE_CHECKING:
    import ml_collections


def check(config: Config) -> None:
    """Raises ConfigError for the first field that names no kind, or that its kind refuses.

    `config.checks` has looked at ranges and structure; what a loss, an adapter or a data set takes only it knows.

    Args:
      config: a run's config, structurally sound.
    """
    datasets.check(config)


def to_config_dict(config: Config) -> "ml_collections.ConfigDict":
    """Turns a config into a ConfigDict for `configs/*.py`: a flag may set every field of every kind in the tables.

    Args:
      config: a run's config.

    Returns:
      Its fields, with those that kinds have for themselves at their defaults where the config does not give them.
    """
    return conversion.to_config_dict(datasets.complete(config))


def differences(old: Config, new: Config) -> list[str]:
    """Lists the fields whose change would make a resumed run another run.

    Args:
      old: what the work directory was trained with.
      new: what is asked for.

    Returns:
      A line for each such field, with both values.
    """
    return resume.differences(datasets.complete(old), datasets.complete(new), datasets.free_on_resume())
