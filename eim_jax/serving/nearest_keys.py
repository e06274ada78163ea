"""The training samples whose keys are nearest to a picture: what the arm's contrastive losses see in it."""

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from eim_jax.data.conversation import readable
from eim_jax.losses.kinds import ContrastiveLoss
from eim_jax.losses.neighbours import similarities
from eim_jax.losses.queue_files import StaleQueue
from eim_jax.losses.queues import Queue
from eim_jax.losses.table import losses_of
from eim_jax.models.batch import Batch
from eim_jax.serving.errors import RequestError
from eim_jax.serving.served_arm import ServedArm
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console

_SIDE = 160  # pixels of a training picture as the page shows it
_FIELDS = {"image", "has_image", "before"}  # what a picture alone gives, and what no query reads


class NearestKeys:
    """The queues of the losses whose query is a picture's: loss_IE and loss_ST, of those that the arms were trained by.

    Args:
      inputs: the run's, with its training data.
      arms: the served ones. Queues that the work directory does not hold are built.
    """

    def __init__(self, inputs: Inputs, arms: Iterable[ServedArm] = ()) -> None:
        self._inputs = inputs
        self._losses: dict[str, list[ContrastiveLoss]] = {}
        self._queues: dict[str, Queue] = {}
        self._lacking: dict[str, str] = {}
        for arm in arms:
            self.add(arm)

    def add(self, arm: ServedArm) -> None:
        """Reads, or builds, the queues of an arm's losses; where they are of another form, it says so and has none."""
        config = self._inputs.config
        stages = (config.stages[stage] for stage in config.arm[arm.name].sequence)
        seen = [loss for loss in losses_of(*stages) if _of_picture(loss, config.losses)]
        for kind in (loss.queue for loss in seen):
            if kind.name not in self._queues:
                try:
                    self._queues[kind.name] = self._inputs.queue(arm.vlm, kind)
                except StaleQueue:
                    self._lacking[arm.name] = (
                        f"arm {arm.name} has no nearest keys here: the run's queue {kind.name} was made from other "
                        "files or settings, or on another kind of device, where keys have another type"
                    )
                    console.print(self._lacking[arm.name], soft_wrap=True)
                    return
        self._losses[arm.name] = seen

    def of(self, arm: ServedArm, crop: UInt8[np.ndarray, "h w 3"], count: int) -> list[dict[str, Any]]:
        """Returns the nearest training samples of a picture, for each loss: of the texts about one picture the nearest.

        Args:
          arm: as it sees the picture.
          crop: the picture as the vision tower reads it.
          count: how many.

        Returns:
          [{"loss", "queue", "rows", "similarity" (its kind), "nearest"}], the last a list of
          {"row", "id", "similarity", "text", "picture"}; `picture` is a data URL, None for a sample without one.

        Raises:
          RequestError: the arm's queues cannot be read here.
        """
        if arm.name in self._lacking:
            raise RequestError(self._lacking[arm.name], status=404, param="model")
        size, settings = arm.padded(1), self._inputs.config.losses
        batch = Batch(np.zeros(size, np.int32), image=np.repeat(crop[None], size, 0), has_image=np.ones(size, bool))
        found = []
        for loss in self._losses[arm.name]:
            queue = self._queues[loss.queue.name]
            similar = np.asarray(similarities(arm.vlm, settings, loss, arm.tree, batch, queue))[0, : queue.count]
            found.append(
                {
                    "loss": loss.title,
                    "queue": loss.queue.symbol,
                    "rows": queue.count,
                    "similarity": settings.similarity,
                    "nearest": [self._sample(row, float(similar[row])) for row in self._highest(similar, count)],
                }
            )
        return found

    def _highest(self, similar: np.ndarray, count: int) -> list[int]:
        groups = self._inputs.samples.groups
        found: dict[int, int] = {}
        for row in np.argsort(-similar, kind="stable").tolist():
            found.setdefault(int(groups[row]), row)
            if len(found) == count:
                break
        return list(found.values())

    def _sample(self, row: int, similarity: float) -> dict[str, Any]:
        split = self._inputs.samples
        sample = split.samples[row]
        text = " ".join(filter(None, (readable(sample.instruction), sample.caption or sample.response)))
        picture = None if sample.image is None else _thumbnail(split.images[sample.image])
        return {"row": row, "id": sample.id, "similarity": similarity, "text": text, "picture": picture}


def _of_picture(loss: Any, settings: Any) -> bool:
    return loss.queue is not None and loss.fields(settings) <= _FIELDS


def _thumbnail(picture: Any) -> str:
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
