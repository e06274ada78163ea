"""A finished run in Python: `eim_jax.load("runs/photos").caption(["a.jpg"])`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eim_jax.commands.trained_arms import load_finished, trained
from eim_jax.config import Config, ConfigError, read_saved
from eim_jax.data.datasets import chat_prompt, data_set
from eim_jax.data.samples import DrawnImages, Split
from eim_jax.generation.batched_inference import generate_text
from eim_jax.generation.visual_tokens import encode_images
from eim_jax.models.vlm import VLM
from eim_jax.training import partition
from eim_jax.training.setup import Inputs
from eim_jax.utils.files import user_path
from eim_jax.utils.images import load_rgb

Picture = str | os.PathLike[str] | Image.Image | np.ndarray


class Run:
    """One arm of a finished run, with the decoding of its config.

    Attributes:
      config: the run's config, decoding included.
      arm: the arm's name.
    """

    def __init__(self, inputs: Inputs, arm: str) -> None:
        self._inputs, self.arm = inputs, arm

    @property
    def config(self) -> Config:
        """The config that the run was trained with, decoding as `load` was asked."""
        return self._inputs.config

    @cached_property
    def _trained(self) -> tuple[VLM, partition.Flat]:
        return trained(self._inputs, self.arm)

    @property
    def model(self) -> VLM:
        """The towers and the connector as pure functions: `encode_image`, `connect`, `token_logits`, ..."""
        return self._trained[0]

    @cached_property
    def params(self) -> dict[str, Any]:
        """The arm's parameters as one nested tree {"visual", "text", "st", "lm"}, as `model`'s functions take them."""
        return partition.unflatten(self._trained[1])

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return self._inputs.lm_tokenizer

    def caption(self, images: Sequence[Picture] | Picture, method: str = "") -> list[str]:
        """Captions pictures.

        Args:
          images: files, PIL images, or uint8 arrays [height width 3]; one or several.
          method: "greedy", "beam" or "nucleus"; by default the first of `config.decode.methods`.

        Returns:
          One caption a picture, in order.

        Raises:
          ConfigError: the run was trained to follow instructions (use `ask`).
          ValueError: a picture cannot be read; the message names it.
        """
        if data_set(self.config.data).prompt is not None:
            raise ConfigError("this run was trained to follow instructions: use ask(image, question)")
        pictures = list(images) if _are_several(images) else [images]
        return self._generate(pictures, [""] * len(pictures), method) if pictures else []

    def ask(self, image: Picture | None, question: str, method: str = "") -> str:
        """Answers a question about a picture, or without one.

        Args:
          image: a file, a PIL image, a uint8 array [height width 3], or None.
          question: in words.
          method: as `caption`.

        Raises:
          ConfigError: the run was trained to caption pictures (use `caption`).
          ValueError: the picture cannot be read; the message names it.
        """
        if data_set(self.config.data).prompt is None:
            raise ConfigError("this run was trained to caption pictures: use caption(images)")
        return self._generate([image], [chat_prompt(self.config.data, question, ())], method)[0]

    def _generate(self, pictures: Sequence[Picture | None], prompts: list[str], method: str) -> list[str]:
        shown = [picture for picture in pictures if picture is not None]
        names = [_name(picture, i) for i, picture in enumerate(shown)]
        ids = [f"{i}: {name}" for i, name in enumerate(names)]  # a picture may be given twice
        split = Split("given", (), DrawnImages(ids, lambda row: _read(shown[row]), names))
        rows = iter(range(len(shown)))
        images = [None if picture is None else next(rows) for picture in pictures]
        inputs = replace(
            self._inputs,
            config=replace(self.config, decode=replace(self.config.decode, batch=min(len(images), self._batch))),
        )
        visual = encode_images(inputs, *self._trained, split, images, quiet=True)
        method = method or self.config.decode.methods[0]
        return generate_text(inputs, *self._trained, visual, images, prompts, method, "text", quiet=True)

    @property
    def _batch(self) -> int:
        return self.config.decode.batch

    def __repr__(self) -> str:
        """The work directory and the arm."""
        return f"Run({str(self._inputs.workdir)!r}, arm={self.arm!r})"


def load(workdir: str | os.PathLike[str], arm: str = "", **decode: Any) -> Run:
    """Opens a finished run.

    Args:
      workdir: what `--workdir` was.
      arm: which arm; by default the last one.
      **decode: fields of `config.decode` to change, such as `max_tokens=30` or `beams=3`.

    Returns:
      The arm, whose parameters are read when they are first needed.

    Raises:
      ConfigError: the folder holds no run, the run has no such arm or field, or a stage is not finished.

    Example:
      >>> run = load("runs/photos")  # doctest: +SKIP
      >>> run.caption(["a.jpg", "b.jpg"])  # doctest: +SKIP
      ['a dog on a beach.', 'two people at a table.']
    """
    folder = Path(workdir).expanduser()
    config = read_saved(folder)
    if config is None:
        raise ConfigError(f"{folder} holds no run (no run.json): give the --workdir of a trained one")
    arm = arm or config.arms[-1]
    if arm not in config.arms:
        raise ConfigError(f"{folder}: no arm {arm!r}; this run has {', '.join(config.arms)}")
    unknown = [name for name in decode if name not in _fields(config.decode)]
    if unknown:
        raise ConfigError(f"config.decode has no field {unknown[0]!r}; it has {', '.join(_fields(config.decode))}")
    return Run(load_finished(replace(config, decode=replace(config.decode, **decode)), folder), arm)


def _fields(settings: Any) -> Mapping[str, Any]:
    return vars(settings)


def _are_several(images: Any) -> bool:
    return isinstance(images, Sequence) and not isinstance(images, str)


def _name(picture: Picture, number: int) -> str:
    return str(picture) if isinstance(picture, str | os.PathLike) else f"picture {number}"


def _read(picture: Picture) -> Image.Image:
    """A picture in mode RGB, whatever it was given as."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"an array of {picture.dtype} {picture.shape}: give uint8 [height width 3]")
        return Image.fromarray(picture)
    return load_rgb(user_path(picture))
