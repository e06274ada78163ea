"""Arms on their way into the server: those that are finished now, and those that a run finishes meanwhile."""

import contextlib
import queue
import threading
from collections.abc import Sequence

import numpy as np

from eim_jax.commands.trained_arms import check_identity, load_finished, trained, unfinished_stage
from eim_jax.config import ConfigError
from eim_jax.data.datasets import chat_prompt
from eim_jax.serving.conversation import prompt_tokens
from eim_jax.serving.engine import Engine
from eim_jax.serving.errors import RequestError
from eim_jax.serving.job import Failed, Job, Settings
from eim_jax.serving.nearest_keys import NearestKeys
from eim_jax.serving.served_arm import ServedArm
from eim_jax.serving.service import Service
from eim_jax.training import setup
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console

_LOOK = 2.0  # seconds between two looks at which arms are finished


class ArrivingArms:
    """Has a service answer by each arm, from when its last stage is finished.

    Args:
      service: it says of the others why they are not there.
      names: the arms.
      neighbours: the training data are loaded too, and the queues of the arms' losses.
    """

    def __init__(self, service: Service, names: Sequence[str], *, neighbours: bool) -> None:
        self._service, self._names, self._neighbours = service, tuple(names), neighbours
        self._inputs: Inputs | None = None
        self._failed: set[str] = set()
        self._ended, self._idle = threading.Event(), threading.Event()
        self._idle.set()

    def begin(self) -> None:
        """Serves the arms that are finished, and says which are not.

        Raises:
          ConfigError, Damaged: one that is finished cannot be served.
        """
        for name in self._coming():
            self._serve(name)
        for why in self._service.pending.values():
            console.print(f"not served: {why} (it will be, once it is trained)", soft_wrap=True)

    def follow(self) -> None:
        """Serves each other arm once it is finished; what goes wrong with one is said, here and on the page."""
        said = ""
        while not self._ended.wait(_LOOK):
            self._idle.clear()
            try:
                self._look()
            except OSError as error:  # a file system that is away for a while: the next look may succeed
                if not self._ended.is_set() and str(error) != said:
                    said = str(error)
                    console.print(f"the run cannot be looked at now, it is tried again: {error}", soft_wrap=True)
            finally:
                self._idle.set()

    def end(self, seconds: float) -> bool:
        """Has `follow` return.

        Args:
          seconds: how long it may take: an arm that is being loaded is not left halfway.

        Returns:
          Whether no arm is being loaded any more.
        """
        self._ended.set()
        return self._idle.wait(seconds)

    def _look(self) -> None:
        for name in self._coming():
            if self._ended.is_set():
                return
            try:
                self._serve(name)
            except OSError:
                raise
            except Exception as error:
                if self._ended.is_set():  # by the engine that has stopped
                    return
                self._failed.add(name)
                self._service.pending[name] = f"arm {name} cannot be served: {type(error).__name__}: {error}"
                console.print(self._service.pending[name], soft_wrap=True)
            else:
                console.print(f"arm {name} is finished, and answers", soft_wrap=True)

    def _coming(self) -> list[str]:
        """The arms that are finished and not served yet; why the others are not is told to the service."""
        service, coming = self._service, []
        for name in self._names:
            if name in self._failed or name in service.arms:
                continue
            stage = unfinished_stage(service.config, service.workdir, name)
            if stage is None:
                coming.append(name)
            service.pending[name] = (
                f"stage {stage} of arm {name} is not finished" if stage else f"arm {name} is loading"
            )
        return coming

    def _serve(self, name: str) -> None:
        inputs = self._loaded()
        arm = served_arm(inputs, name)
        if self._neighbours:
            nearest = self._service.nearest or NearestKeys(inputs)
            nearest.add(arm)
            self._service.nearest = nearest
        self._service.engine.add(arm)
        warm_up(self._service.engine, name)
        del self._service.pending[name]

    def _loaded(self) -> Inputs:
        if self._inputs is None:
            config, workdir = self._service.config, self._service.workdir
            if self._neighbours:
                self._inputs = setup.load(config, workdir)
                check_identity(self._inputs)
            else:
                self._inputs = load_finished(config, workdir)
        return self._inputs


def served_arm(inputs: Inputs, name: str) -> ServedArm:
    """Returns a finished arm.

    Args:
      inputs: the run's.
      name: the arm's.

    Raises:
      ConfigError: it is not finished.
    """
    return ServedArm(name, inputs, *trained(inputs, name))


def warm_up(engine: Engine, name: str) -> None:
    """Has an arm answer groups of each size by the run's own decoding, so that nobody waits for their programs.

    Args:
      engine: started.
      name: the arm's.

    Raises:
      ConfigError: it does not answer; the message says why.
    """
    arm = engine.arms[name]
    data, decode, size = arm.inputs.config.data, arm.inputs.config.decode, arm.vlm.visual.config.image_size
    sizes = ", ".join(map(str, arm.sizes))
    console.print(f"arm {name}: compiling for groups of {sizes}", soft_wrap=True)
    prompt, blank = chat_prompt(data, "?") if arm.asks else "", np.zeros((size, size, 3), np.uint8)
    ids = prompt_tokens(data, prompt, True, arm.tokenizer, arm.longest_prompt)
    settings = Settings(decode.methods[0], 0.0, 1.0, 1, 0)
    answers: queue.SimpleQueue = queue.SimpleQueue()
    for count in arm.sizes:
        engine.together([Job(name, blank, ids, settings, (), False, answers.put) for _ in range(count)])
        for _ in range(count):
            if isinstance(found := answers.get(), Failed):
                raise ConfigError(f"arm {name} does not answer: {found.error}") from found.error
    with contextlib.suppress(RequestError):  # of a text without a token that this run supervises
        engine.call(name, lambda served: served.likelihood(blank, prompt, "a"))
