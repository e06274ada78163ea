"""What a config asks of the kinds: names that are in their tables, fields that they take."""

from eim_jax.config import Config


def check(config: Config) -> None:
    """Raises ConfigError for the first field that names no kind, or that its kind refuses.

    `config.checks` has looked at ranges and structure; what a loss, an adapter or a data set takes only it knows.

    Args:
      config: a run's config, structurally sound.
    """
