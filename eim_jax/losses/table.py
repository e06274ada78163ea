"""The losses that stages may name: `stages.*.losses.NAME` of a config is the weight of `LOSSES["NAME"]`.

| loss | query | key | queue |
|---|---|---|---|
| base | - | - | next-token cross-entropy of the response |
| ie | [CLS] through CLIP's frozen output layer | [EOS] feature of CLIP.text | K_t |
| st | mean over the ST's output tokens | mean over LM_e of the sample's text | K_e |
| lm | last-token vector out of LM_block | the same vector of the original LM | K_b |

A loss of your own: `LOSSES["mine"] = ContrastiveLoss("mine", ...)`, in a script or in the config file that names it.
"""

import difflib
import re
import zlib
from collections.abc import Iterable
from typing import Any, cast

import jax

from eim_jax.config import Config, ConfigError, Losses, Stage, patterns
from eim_jax.config.fields import by_loss
from eim_jax.config.tables import LOSSES
from eim_jax.losses.centering import Center
from eim_jax.losses.kinds import Loss, QueueKind
from eim_jax.losses.loss_base import BASE
from eim_jax.losses.loss_ie import IE
from eim_jax.losses.loss_lm import LM
from eim_jax.losses.loss_st import ST
from eim_jax.losses.negatives import FORMS, parse
from eim_jax.models.vlm import VLM

OWN = "loss/"  # before the paths of what losses have of their own ("loss/NAME/...")

# Their order is that of logs and charts, and of the terms in a stage's sum.
LOSSES |= {loss.name: loss for loss in (BASE, IE, ST, LM)}

__all__ = [
    "LOSSES",
    "OWN",
    "center_of",
    "check",
    "check_trained",
    "heads",
    "losses_of",
    "queues_of",
    "symbol_of",
    "title_of",
    "unit_of",
    "unknown",
    "weights",
]


def weights(stage: Stage) -> dict[str, float]:
    """The stage's losses with a weight above 0, in the table's order."""
    return {name: stage.losses[name] for name in LOSSES if stage.losses.get(name, 0) > 0}


def losses_of(*stages: Stage) -> list[Loss]:
    """The losses of these stages, each once, in the table's order."""
    return [loss for name, loss in LOSSES.items() if any(name in weights(stage) for stage in stages)]


def queues_of(*stages: Stage) -> list[QueueKind]:
    """The queues that the losses of these stages read, each once."""
    return list(dict.fromkeys(loss.queue for loss in losses_of(*stages) if loss.queue is not None))


def heads(vlm: VLM, key: jax.Array, *stages: Stage) -> dict[str, Any]:
    """The parameters that losses of these stages have of their own: {loss: tree}; those that have none are left out.

    Args:
      vlm: the arm's modules.
      key: of the run's seed; each loss draws by its own, which does not depend on what other losses there are.
      stages: an arm's.
    """
    asked = ((loss, getattr(loss, "drawn", None)) for loss in losses_of(*stages))
    own = {loss.name: draw for loss, draw in asked if draw is not None}
    return {name: draw(vlm, jax.random.fold_in(key, zlib.crc32(name.encode()))) for name, draw in own.items()}


def check_trained(arm: str, stages: dict[str, Stage], paths: Iterable[str]) -> None:
    """Raises ConfigError for a loss of these stages, an arm's sequence, with parameters of its own that none trains."""
    trained = [pattern for stage in stages.values() for pattern, _ in patterns(stage)]
    own: dict[str, list[str]] = {}
    for path in paths:
        if path.startswith(OWN):
            own.setdefault(path.split("/")[1], []).append(path)
    for name, leaves in own.items():
        if not any(re.fullmatch(pattern, path) for pattern in trained for path in leaves):
            [where, *_] = [stage for stage in stages if stages[stage].losses.get(name, 0) > 0]
            raise ConfigError(
                f"config.stages.{where}.losses.{name} has parameters of its own, which no stage of arm {arm} trains: "
                f"they would stay as they were drawn. Add '{OWN}{name}/.*' to config.stages.{where}.train"
            )


def unknown(*stages: Stage) -> list[str]:
    """The losses of these stages that this process does not know."""
    return [name for stage in stages for name, weight in stage.losses.items() if weight > 0 and name not in LOSSES]


def title_of(name: str) -> str:
    """A loss as reports call it; by its name alone where this process does not know it."""
    return LOSSES[name].title if name in LOSSES else name


def unit_of(name: str) -> str:
    """What a loss is in, as charts write it: nats, unless it says otherwise."""
    return getattr(LOSSES.get(name), "unit", "nats")


def symbol_of(name: str) -> str:
    """A loss's queue as charts call it; by the loss's name where this process does not know it."""
    queue = LOSSES[name].queue if name in LOSSES else None
    return queue.symbol if queue is not None else name


def check(config: Config) -> None:
    """Raises ConfigError for a weight whose name no loss has, or settings that a loss refuses."""
    for where, stage in config.stages.items():
        for name in stage.losses:
            if name not in LOSSES:
                near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(LOSSES)}."
                raise ConfigError(
                    f"config.stages.{where}.losses.{name}: no such loss; {hint} A loss of your own is entered in "
                    "eim_jax.losses.table.LOSSES before the run starts: where a config file does that, name it as "
                    "--config"
                )
    for field in ("positives", "negatives", "center"):
        for name in by_loss(getattr(config.losses, field))[1]:
            known = [loss.name for loss in LOSSES.values() if loss.queue is not None]
            if name not in known:
                raise ConfigError(
                    f"config.losses.{field}: {name!r} is no loss with a queue; there are {', '.join(known)}"
                )
    _check_negatives(config.losses.negatives)
    for loss in LOSSES.values():
        loss.check(config)
        if loss.queue is not None:
            center_of(loss.queue, config.losses)


def _check_negatives(setting: str) -> None:
    for_all, named = by_loss(setting)
    if len(named) < setting.count(":"):
        raise ConfigError(f"config.losses.negatives: {setting!r} names a loss twice")
    for word in ([for_all] if for_all or not named else []) + list(named.values()):
        if parse(word) is None:
            raise ConfigError(
                f"config.losses.negatives: {word!r} is none of {FORMS}; for some losses alone: 'ie:batch, lm:10%'"
            )


def center_of(queue: QueueKind, settings: Losses) -> Center:
    """What is taken from a queue's keys, by `losses.center` for the losses that read it.

    Raises:
      ConfigError: they disagree.
    """
    found = {loss.name: settings.of("center", loss.name) for loss in LOSSES.values() if loss.queue == queue}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name}:{word}" for name, word in found.items())
        raise ConfigError(f"config.losses.center: {said}, but these losses share the queue {queue.name!r}: make it one")
    return cast(Center, next(iter(found.values()), "none"))
