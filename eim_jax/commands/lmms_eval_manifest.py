"""The entry point by which lmms-eval finds a finished run: `lmms-eval --model eim_jax --model_args workdir=...`."""

from typing import Any


def manifest() -> Any:
    """Returns what lmms-eval registers; it imports the model itself once it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("eim_jax", simple_class_path="eim_jax.commands.lmms_eval_model.FinishedRun")
