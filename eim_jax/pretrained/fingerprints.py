"""What a checkpoint or a parameter tree is known by, so that other weights are noticed."""

import hashlib
import json
import pathlib

import numpy as np
from flax.traverse_util import flatten_dict

from eim_jax.parallel.processes import fetch
from eim_jax.pretrained import json_files, weight_files
from eim_jax.pretrained.clip import PROMPT_FILE
from eim_jax.pretrained.hub import resolve
from eim_jax.pretrained.language import config_file


def fingerprint(source: str | pathlib.Path | dict) -> str:
    """Returns 16 hex digits of SHA-256 over a checkpoint, for manifests that must notice other weights.

    Args:
      source: what `resolve` takes: the bytes of the safetensors files and the configuration count, not names or
        versions noted in it; or a parameter tree: paths, dtypes, shapes and bytes count. The two never agree.
    """
    digest = hashlib.sha256()
    if isinstance(source, dict):
        for path, leaf in sorted(flatten_dict(source, sep="/").items()):
            array = fetch(leaf)
            digest.update(f"{path} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]
    directory = resolve(source)
    config = json_files.read_json(config_file(directory))
    meaning = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(meaning, sort_keys=True).encode())
    prompt = directory / PROMPT_FILE
    for path in [*weight_files.weight_files(directory), *([prompt] if prompt.is_file() else [])]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
