"""Where a checkpoint lies: in the package, in a local directory, or on the Hugging Face hub."""

import importlib.resources
import pathlib
import re

import huggingface_hub

from eim_jax.models.hugging_face import WeightsError
from eim_jax.utils.console import console

BUILTIN = {"miniature/clip": "clip", "miniature/gpt2": "gpt2", "miniature/llama": "llama"}
FILES = ("*.json", "*.txt", "model*.safetensors", "prompt.safetensors", "tokenizer.model", "spiece.model")
CONVERTER = "SFconvertbot"  # the hub's own account, which offers older checkpoints in safetensors as a pull request


def resolve(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the local directory of a checkpoint.

    Args:
      path: "miniature/clip", "miniature/gpt2" or "miniature/llama" (shipped in the package), a local directory, or a
        Hugging Face hub id, optionally with "@revision"; hub files are cached by huggingface_hub. Where the main branch
        has no safetensors (openai/clip-vit-base-patch32), the hub's own conversion is taken, and that is said.

    Raises:
      WeightsError: no such directory, and the hub does not give it.
    """
    name = str(path)
    if name in BUILTIN:
        return pathlib.Path(str(importlib.resources.files("eim_jax"))) / "data" / "miniature" / "towers" / BUILTIN[name]
    local = pathlib.Path(path).expanduser()
    if local.is_dir():
        return local
    repo, _, revision = name.partition("@")
    if local.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", repo):
        raise WeightsError(f"{name} is not a directory; give a checkpoint's directory or a Hugging Face hub id")
    try:
        folder = _download(repo, revision or None)
        is_model = (folder / "config.json").is_file()  # a repository of a tokenizer alone has none
        if is_model and not revision and not any(folder.glob("model*.safetensors")):
            folder = _download(repo, _conversion(repo))
        return folder
    except WeightsError:
        raise
    except Exception as error:  # the hub's client raises many kinds; every one means that there are no files
        raise WeightsError(
            f"{name} is no local directory, and the hub did not give it ({type(error).__name__}): {error}. "
            f"Without network: run `hf download {repo} --local-dir DIR` where there is one, and give DIR."
        ) from error


def _download(repo: str, revision: str | None) -> pathlib.Path:
    return pathlib.Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))


def _conversion(repo: str) -> str:
    """The revision of the hub's conversion to safetensors; says that it is taken."""
    offers = huggingface_hub.HfApi().get_repo_discussions(repo, author=CONVERTER, discussion_type="pull_request")
    for offer in offers:
        if "safetensors" in offer.title and offer.status != "closed":
            console.print(
                f"{repo}: no safetensors on main, taking the hub's conversion {offer.git_reference}", soft_wrap=True
            )
            return offer.git_reference
    raise WeightsError(
        f"{repo} has no safetensors on the hub, nor a conversion by {CONVERTER}: run `hf download {repo} --local-dir "
        "DIR` and give DIR (its pytorch_model*.bin are read by PyTorch: pip install '.[torch]' in eim_jax's folder)"
    )
