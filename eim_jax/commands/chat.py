"""`--mode=chat`: a conversation about an image, or about nothing, in the terminal."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from eim_jax.commands.trained_arms import load_finished, trained
from eim_jax.config import Config, ConfigError
from eim_jax.data.datasets import chat_prompt
from eim_jax.data.image_checks import file_problem
from eim_jax.data.samples import FileImages, Split
from eim_jax.generation.batched_inference import generate_text
from eim_jax.generation.visual_tokens import encode_images
from eim_jax.models.vlm import VLM
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console
from eim_jax.utils.files import user_path

HELP = "/image FILE shows another image, /text none, /new forgets the conversation, /quit ends (or Ctrl-D)."


def chat(config: Config, workdir: Path, arm: str, image: Path | None) -> None:
    """Holds a conversation with a trained arm.

    Args:
      config: the run's.
      workdir: of the finished run.
      arm: which of its arms.
      image: what the conversation is about; None for no image.

    Raises:
      ConfigError: the image cannot be read, or a stage is not finished.
    """
    check(image)
    inputs = load_finished(config, workdir)
    converse(inputs, *trained(inputs, arm), image)


def converse(inputs: Inputs, vlm: VLM, params: Flat, image: Path | None) -> None:
    """Answers line after line of the terminal, each after the turns before it if the model was trained so.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      image: the first one, None for none.
    """
    inputs = replace(inputs, config=replace(inputs.config, decode=replace(inputs.config.decode, batch=1)))
    turns: list[tuple[str, str]] = []
    console.print(f"{'image ' + str(image) if image else 'no image'}. {HELP}", soft_wrap=True, markup=False)
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command in ("/image", "/text", "/new"):
            turns = []
            try:
                wanted = user_path(rest) if command == "/image" else None if command == "/text" else image
                check(wanted)
                image = wanted
                console.print(f"{'image ' + str(image) if image else 'no image'}, a new conversation", markup=False)
            except ConfigError as error:
                console.print(f"error: {error}", markup=False)
            continue
        if line.startswith("/"):
            console.print(HELP, markup=False)
            continue
        if line:
            said = answer(inputs, vlm, params, image, line, turns)
            turns.append((line, said))
            console.print(said, soft_wrap=True, markup=False)


def answer(inputs: Inputs, vlm: VLM, params: Flat, image: Path | None, question: str, earlier=()) -> str:
    """Returns the model's answer to one question.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      image: what the question is about, None for no image.
      question: in words.
      earlier: the (question, answer) turns before it.
    """
    names, shown = ([], [None]) if image is None else ([str(image)], [0])
    split = Split("chat", (), FileImages(Path(), names, names))
    seen = encode_images(inputs, vlm, params, split, shown, quiet=True)
    prompts, method = [chat_prompt(inputs.config.data, question, earlier)], inputs.config.decode.methods[0]
    return generate_text(inputs, vlm, params, seen, shown, prompts, method, "answer", quiet=True)[0]


def check(image: Path | None) -> None:
    """Checks the image that the conversation is about.

    Raises:
      ConfigError: it cannot be read.
    """
    problem = None if image is None else file_problem(image) if image.exists() else "no such file"
    if problem:
        raise ConfigError(f"--image: {image}: {problem}")


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return
