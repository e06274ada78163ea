"""The JSON files of a Hugging Face directory: read with their names in every message."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from eim_jax.models.hugging_face import WeightsError

WHOLE = "give the folder of the whole weights, or dequantise them in transformers once and save_pretrained the model"


def read_json(path: pathlib.Path) -> dict:
    """Returns the object in a JSON file.

    Raises:
      WeightsError: the file is missing, no JSON, or holds another thing than an object; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; a checkpoint needs it beside its safetensors") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise WeightsError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {content!r:.40}, not an object ({{...}}); download it again")
    return content


def check_adapter(directory: pathlib.Path) -> None:
    """Raises WeightsError for a folder of PEFT's, which holds an adapter and no model."""
    config = directory / "adapter_config.json"
    if not config.is_file() and not (directory / "adapter_model.safetensors").is_file():
        return
    base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    raise WeightsError(
        f"{directory} holds a PEFT adapter (LoRA or a relative) of {base or 'another model'}, not a model: merge it "
        "once (PeftModel.merge_and_unload), save_pretrained the result, and give that directory"
    )


def of_table(
    directory: pathlib.Path, table: Mapping[str, Any], role: str, refused: Mapping[str, str] | None = None
) -> tuple[Any, dict]:
    """Returns the entry of a table of kinds that a checkpoint is of, and its config.json.

    Args:
      directory: the checkpoint's.
      table: model_type -> what reads it.
      role: what the checkpoint is wanted for, for the message.
      refused: model_type of relatives that are not read -> why, and what to take.

    Raises:
      WeightsError: config.json is missing, its model_type is not in the table, or its weights are quantised.
    """
    if not (directory / "config.json").is_file():
        check_adapter(directory)
    config = read_json(directory / "config.json")
    name = config.get("model_type")
    if not isinstance(name, str) or name not in table:
        if isinstance(name, str) and refused and name in refused:
            raise WeightsError(f"{directory}/config.json: model_type is {name!r}: {refused[name]}")
        known = " or ".join(map(repr, table))
        raise WeightsError(f"{directory}/config.json: model_type is {name!r}; {role} is a {known}")
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
        raise WeightsError(
            f"{directory}/config.json: quantization_config says that the weights are quantised ({method!r:.40}), "
            f"which are not read: {WHOLE}. Whole LLaMA weights are held in 4 bits by config.towers.quant=nf4"
        )
    return table[name], config


@contextlib.contextmanager
def naming(file: pathlib.Path) -> Iterator[None]:
    """Puts the name of a checkpoint's config.json, or another file, before the WeightsErrors that are raised inside."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error
