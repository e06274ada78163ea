"""`--mode=chat`: a conversation about an image, or about nothing, in the terminal."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from eim_jax.commands.trained_arms import load_finished, trained, why_blind
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


def chat(config: Config, workdir: Path | None, arm: str, image: Path | None, *, init: bool = False) -> None:
    """Holds a conversation with a trained arm.

    Args:
      config: the run's.
      workdir: of the finished run; may be None with `init`.
      arm: which of its arms.
      image: what the conversation is about; None for no image.
      init: talks to config.init as it is, in place of what was trained.

    Raises:
      ConfigError: the image cannot be read, or a stage is not finished.
    """
    check(image)
    inputs = load_finished(config, workdir)
    vlm, params = trained(inputs, arm, init=init)
    blind = why_blind(inputs, arm, vlm, params) if init else ""
    check(image, blind)
    converse(inputs, vlm, params, image, blind)


def converse(inputs: Inputs, vlm: VLM, params: Flat, image: Path | None, blind: str = "") -> None:
    """Answers line after line of the terminal, each after the turns before it if the model was trained so.

    Args:
      inputs: the run's.
      vlm: the model.
      params: its parameters.
      image: the first one, None for none.
      blind: why it can be shown no picture; "" where it can.
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
                check(wanted, blind)
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


def check(image: Path | None, blind: str = "") -> None:
    """Checks the image that the conversation is about.

    Args:
      image: None for none.
      blind: why the model can be shown no picture; "" where it can.

    Raises:
      ConfigError: it cannot be read, or not be shown.
    """
    if image is not None and blind:
        raise ConfigError(blind)
    problem = None if image is None else file_problem(image) if image.exists() else "no such file"
    if problem:
        raise ConfigError(f"--image: {image}: {problem}")


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return
