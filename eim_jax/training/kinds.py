"""What a config asks of the kinds: names that are in their tables, fields that they take."""

from typing import TYPE_CHECKING

from eim_jax.config import Config, conversion, listing, resume
from eim_jax.data import datasets
from eim_jax.losses import table as losses
from eim_jax.models import adapters, connector, vision
from eim_jax.training import trackers

if TYPE_CHECKING:
    import ml_collections


def check(config: Config) -> None:
    """Raises ConfigError for the first field that names no kind, or that its kind refuses.

    `config.checks` has looked at ranges and structure; what a loss, an adapter or a data set takes only it knows.

    Args:
      config: a run's config, structurally sound.
    """
    datasets.check(config)
    losses.check(config)
    adapters.check(config)
    connector.check(config)
    vision.check(config)
    trackers.check(config.logging)


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


def field_groups() -> list[listing.Group]:
    """Lists every field of a run: those of `Config`, the weight of each loss, and what each data set alone reads."""
    found = []
    for group in listing.groups(Config):  # `own` is where the data sets' fields are kept, itself no field of a run
        found.append(group._replace(fields=tuple(field for field in group.fields if field.path != "data.own")))
    at = "stages.*.losses"
    weights = tuple(listing.Field(f"{at}.{name}", "float", 0.0, loss.title) for name, loss in losses.LOSSES.items())
    found.append(listing.Group(at, "The weight of each loss in a stage; one of weight 0 is not computed.", weights))
    for name, kind in datasets.DATASETS.items():
        for group in listing.groups(kind.config, "data"):
            found.append(group._replace(said=f"data.kind={name!r}: {group.said}"))
    return found
