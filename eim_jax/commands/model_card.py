"""The model card (README.md) of an exported arm: what was trained, on which data, its scores, the command."""

import dataclasses
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from eim_jax.commands.exported_lms import LLAVA_FOLDER, LM_FOLDER, TEXT_ONLY, WITH_IMAGE
from eim_jax.commands.exported_lora import TERMS_FOLDER, VISION_FOLDER
from eim_jax.commands.trained_arms import read_record
from eim_jax.config import Data, Stage, patterns
from eim_jax.data.datasets import data_set
from eim_jax.losses.table import queues_of
from eim_jax.reporting.scores import table
from eim_jax.training.setup import Inputs
from eim_jax.utils.files import read_json

CARD = "README.md"
_LM = '`transformers.AutoModelForCausalLM.from_pretrained("{folder}")`'
FOLDERS = {
    LM_FOLDER: f"the language model as it was tuned: {_LM}",
    WITH_IMAGE: f"the language model with its adapters folded in, for what follows a picture's tokens: {_LM}",
    TEXT_ONLY: f"the same for text alone: {_LM}",
    TERMS_FOLDER: "the low-rank terms of each tower, as PEFT reads them: "
    '`peft.PeftModel.from_pretrained(base, "lora/lm")`',
    VISION_FOLDER: "the vision tower, its low-rank terms inside its weights",
    LLAVA_FOLDER: "the whole model, with its processor and chat template: "
    '`transformers.LlavaForConditionalGeneration.from_pretrained("llava")`',
}


def text(inputs: Inputs, arm: str, folders: Sequence[str], notes: Sequence[str] = (), remark: str = "") -> str:
    """Returns the card as Markdown with the hub's YAML before it.

    Args:
      inputs: the run's; what its work directory holds of scores and of the command is shown.
      arm: the arm.
      folders: the models that were written beside `trained.safetensors`.
      notes: what was not written, and why.
      remark: what has to be said of the models, "" for nothing.
    """
    config = inputs.config
    run, scores = read_record(inputs.workdir), inputs.workdir / arm / "scores_test.json"
    stages = [(name, config.stages[name]) for name in config.arm[arm].sequence]
    contrastive = queues_of(*(stage for _, stage in stages))
    how = "in stages, with contrastive losses against queues (EIM)" if contrastive else "without contrastive losses"
    parts = [
        _front(inputs),
        f"# {config.arm[arm].description or arm}",
        f"Trained by eim_jax {metadata.version('eim_jax')} {how}, on the towers "
        f"`{config.towers.clip}` and `{config.towers.lm}`; arm `{arm}`.",
        "## What was trained",
        _stages(stages),
        "## Data",
        _data(config.data, len(inputs.train) if inputs.train is not None else None),
        "## Scores",
        _scores(arm, read_json(scores, values=dict)) if scores.exists() else "This arm was not scored.",
        "## Files",
        _files(folders, notes, remark),
    ]
    if command := run.get("command"):
        parts += ["## Command", f"```sh\n{command}\n```", f"Versions: {_list(run.get('versions', {}))}."]
    return "\n\n".join(parts) + "\n"


def _front(inputs: Inputs) -> str:
    """The YAML that the hub reads; a tower is a base model where its name is a hub id."""
    names = [inputs.config.towers.lm, inputs.config.towers.clip]
    bases = [name.partition("@")[0] for name in names if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w.-]+)?", name)]
    bases = [name for name in bases if not name.startswith("miniature/")]
    listed = "".join(f"\n- {name}" for name in bases)
    return "\n".join(
        [
            "---",
            "library_name: eim_jax",
            "pipeline_tag: image-text-to-text",
            *([f"base_model:{listed}"] if bases else []),
            "tags:\n- eim\n- vision-language",
            "---",
        ]
    )


def _stages(stages: Sequence[tuple[str, Stage]]) -> str:
    rows = ["| stage | trains | losses | length | batch | rate |", "|---|---|---|---|---|---|"]
    for name, stage in stages:
        trains = ", ".join(f"`{pattern}`" for pattern, _ in patterns(stage)).replace("|", "\\|")
        losses = ", ".join(f"{weight:g} {loss}" for loss, weight in stage.losses.items() if weight)
        length = f"{stage.steps:,} steps" if stage.steps else f"{stage.epochs} epochs"
        rows.append(f"| {name} | {trains} | {losses} | {length} | {stage.batch} | {stage.lr:g} |")
    return "\n".join(rows) if stages else "Nothing: this is the checkpoint that the arm starts from."


def _data(data: Data, samples: int | None) -> str:
    """The kind of data set, its size where it was loaded, and its own fields that differ from their defaults."""
    fields = {field.name: field.default for field in dataclasses.fields(data_set(data).config)}
    own = {name: data.own[name] for name, default in fields.items() if data.own.get(name, default) != default}
    count = f", {samples:,} samples" if samples is not None else ""
    return f"`{data.kind}`{count}" + (f": {_list(own)}." if own else ".")


def _scores(arm: str, scores: dict[str, dict]) -> str:
    found = table({arm: scores})
    head = ["decoding", *(column.label for column in found["columns"])]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in found["methods"]:
        for row in method["rows"]:
            cells = [f"{cell['text']} {cell.get('interval', '')}".strip() for cell in row["cells"]]
            rows.append(f"| {' | '.join([method['name'], *cells])} |")
    intervals = ["In brackets: 95 % intervals, by bootstrap over the test items."] if found["intervals"] else []
    return "\n".join([*rows, *(f"\n{line}" for line in (*intervals, *found["missing"], *found["notes"]))])


def _files(folders: Sequence[str], notes: Sequence[str], remark: str) -> str:
    lines = [
        "- `trained.safetensors`, `arm.json`: every leaf that training changed or added, and the towers that "
        "it belongs to, for `eim_jax --config=CONFIG --init=FOLDER --mode=chat` (or `caption`, `eval`, `train`)"
    ]
    lines += [f"- `{name}/`: {FOLDERS[name].format(folder=name)}" for name in folders]
    lines += [f"- {remark}"] if remark else []
    return "\n".join([*lines, *(f"- Not written: {note}" for note in notes)])


def _list(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} `{value}`" for name, value in values.items())
