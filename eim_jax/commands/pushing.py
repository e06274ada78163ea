"""An exported folder on the Hugging Face hub (--push)."""

import re
from pathlib import Path

import huggingface_hub

from eim_jax.config import ConfigError
from eim_jax.utils.console import console


def check(name: str) -> None:
    """Raises ConfigError where `name` is no repository's name with its owner's."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(f"--push={name}: give the repository with its owner, --push=USER/NAME")


def push(folder: Path, name: str) -> None:
    """Uploads a folder as a model's repository, which is made if it is not there; files beside it there stay.

    The account is that of `hf auth login` or of HF_TOKEN.

    Args:
      folder: an export.
      name: "user/name".

    Raises:
      ConfigError: the hub did not take it.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=name, repo_type="model", folder_path=folder, commit_message="Export of a run of eim_jax"
        )
    except Exception as error:  # the hub's client raises many kinds; each one means that not all is there
        raise ConfigError(
            f"--push={name}: the hub did not take {folder} ({type(error).__name__}): {error}. Log in by `hf auth "
            "login` with a token that may write; then the same command uploads what is missing"
        ) from error
    console.print(f"pushed to {address}", soft_wrap=True)
