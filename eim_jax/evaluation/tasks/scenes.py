"""The task "scenes": captions of drawn scenes, compared with the references and with what the scene exactly holds."""

from collections.abc import Mapping
from pathlib import Path

from eim_jax.data.miniature.captioning import attribute_f1
from eim_jax.evaluation.metrics.named_objects import object_rows
from eim_jax.evaluation.tasks.captions import Captions
from eim_jax.evaluation.tasks.task import Asked, Predicted, Scored
from eim_jax.training.setup import Inputs


class Scenes(Captions):
    """Captions of a `MiniatureSplit`'s images: also yields the F1 of the objects that they name."""

    name = "scenes"

    def score(
        self,
        inputs: Inputs,
        asked: Asked,
        predicted: Predicted,
        outputs: Mapping[str, str],
        directory: Path,
        method: str,
    ) -> Scored:
        """Compares the captions with the references and with the scenes."""
        scores, rows = super().score(inputs, asked, predicted, outputs, directory, method)
        scenes = asked.split.scenes
        return Scored({**scores, **attribute_f1(outputs, scenes)}, {**rows, **object_rows(outputs, scenes)})


SCENES = Scenes()
