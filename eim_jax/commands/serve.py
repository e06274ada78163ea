"""`--mode=serve`: a finished run behind a page and OpenAI's chat completions, for this machine alone unless told."""

import os
import queue
from pathlib import Path

import numpy as np

from eim_jax.commands.trained_arms import check_identity, load_finished, trained
from eim_jax.config import Config, ConfigError
from eim_jax.data.datasets import chat_prompt
from eim_jax.serving.conversation import prompt_tokens
from eim_jax.serving.engine import Engine
from eim_jax.serving.job import Failed, Job, Settings
from eim_jax.serving.nearest_keys import NearestKeys
from eim_jax.serving.served_arm import ServedArm
from eim_jax.serving.server import LOOPBACK, listen
from eim_jax.serving.server import serve as run_server
from eim_jax.serving.service import Options, Service
from eim_jax.training import setup
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import console

KEY_VARIABLE = "EIM_JAX_API_KEY"


def serve(
    config: Config,
    workdir: Path,
    arm: str,
    host: str,
    port: int,
    options: Options,
    *,
    neighbours: bool = False,
) -> None:
    """Serves a run's finished arms until a signal.

    Args:
      config: the run's.
      workdir: of the run.
      arm: this arm alone; "" for all that are finished.
      host: the address to listen at.
      port: 0 takes a free one.
      options: the operator's; without a key the one of the environment is taken.
      neighbours: the training data are loaded, and the queues built that are not there.

    Raises:
      ConfigError: no arm is finished, or the address cannot be had.
    """
    listening = listen(host, port)
    with listening:
        if neighbours:
            inputs = setup.load(config, workdir)
            check_identity(inputs)
        else:
            inputs = load_finished(config, workdir)
        arms = served_arms(inputs, [arm] if arm else list(config.arms))
        nearest = NearestKeys(inputs, arms) if neighbours else None
        engine = Engine(arms, options.max_waiting)
        engine.start()
        for name in arms:
            console.print(f"arm {name}: compiling")
            warm_up(engine, name)
        run_server_with(Service(inputs.config, workdir, engine, options, nearest), listening, host)


def run_server_with(service: Service, listening, host: str) -> None:
    """Says where the server is, and serves."""
    key = bool(service.options.api_key)
    if host not in LOOPBACK and not key:
        console.print(
            f"anyone who reaches {host} can use it: set {KEY_VARIABLE} or --api_key", style="yellow", soft_wrap=True
        )

    def say(address: str) -> None:
        names = ", ".join(service.engine.arms)
        console.print(f"{address}  the page; {address}/v1  OpenAI's chat completions (models: {names})", soft_wrap=True)

    if run_server(service, listening, say):
        service.engine.stop()
        console.print("stopped: all that was begun is answered")


def options_of(host: str, api_key: str, max_waiting: int, max_body: int, ignore_text: bool) -> Options:
    """Returns the operator's choices.

    Args:
      host: the address to listen at; on the loopback the server answers to its names alone.
      api_key: "" takes that of the environment, if there is one.
      max_waiting: requests that may wait.
      max_body: mebibytes.
      ignore_text: see `Options`.
    """
    hosts = LOOPBACK if host in LOOPBACK else ()
    return Options(api_key or os.environ.get(KEY_VARIABLE, ""), max_waiting, max_body << 20, ignore_text, hosts)


def served_arms(inputs: Inputs, names: list[str]) -> dict[str, ServedArm]:
    """Returns the finished ones of these arms; says which are not.

    Args:
      inputs: the run's.
      names: the arms.

    Raises:
      ConfigError: none of them is finished.
    """
    found, problems = {}, []
    for name in names:
        try:
            found[name] = ServedArm(name, inputs, *trained(inputs, name))
        except ConfigError as error:
            problems.append(str(error))
    if not found:
        raise ConfigError("; ".join(problems))
    for problem in problems:
        console.print(f"not served: {problem}", soft_wrap=True, markup=False)
    return found


def warm_up(engine: Engine, name: str) -> None:
    """Has an arm answer once, so that its programs are compiled before the first request.

    Args:
      engine: started.
      name: the arm's.
    """
    arm = engine.arms[name]
    data, decode, size = arm.inputs.config.data, arm.inputs.config.decode, arm.vlm.visual.config.image_size
    prompt = chat_prompt(data, "?") if arm.asks else ""
    ids = prompt_tokens(data, prompt, True, arm.tokenizer, arm.longest_prompt)
    answers: queue.SimpleQueue = queue.SimpleQueue()
    settings = Settings(decode.methods[0], 0.0, 1.0, arm.most, 0)
    engine.submit(Job(name, np.zeros((size, size, 3), np.uint8), ids, settings, (), False, answers.put))
    if isinstance(found := answers.get(), Failed):
        raise found.error
