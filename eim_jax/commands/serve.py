"""`--mode=serve`: a run behind a page and OpenAI's chat completions, for this machine alone unless told.

A run that is still being trained is followed: its report from the beginning, each arm once it is finished.
"""

import os
import sys
import threading
from pathlib import Path

import jax

from eim_jax.commands.arriving_arms import ArrivingArms
from eim_jax.config import Config, ConfigError
from eim_jax.serving.engine import Engine
from eim_jax.serving.server import LOOPBACK, listen
from eim_jax.serving.server import serve as run_server
from eim_jax.serving.service import Options, Service
from eim_jax.utils.console import console

KEY_VARIABLE = "EIM_JAX_API_KEY"
_GRACE = 5.0  # seconds for an arm that is being loaded when the server ends


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
    """Serves a run's report, and its arms as they are finished, until a signal.

    Args:
      config: the run's.
      workdir: of the run. While a run works in it, nothing is written there.
      arm: this arm alone; "" for all.
      host: the address to listen at.
      port: 0 takes a free one.
      options: the operator's; without a key the one of the environment is taken.
      neighbours: the training data are loaded, and the queues built that are not there.

    Raises:
      ConfigError: the folder holds no run, it was trained from other files, or the address cannot be had.
    """
    if not (workdir / "run.json").exists():
        raise ConfigError(f"{workdir} holds no run (no run.json): run --mode=train first")
    listening = listen(host, port)
    with listening:
        engine = Engine({}, options.max_waiting)
        service = Service(config, workdir, engine, options)
        progress = service.run.progress()
        console.print(("this run is " if progress.state == "finished" else "") + progress.words, soft_wrap=True)
        if progress.state != "finished":  # one that stopped may be continued while it is served
            _keep_out(workdir)
        engine.start()
        arms = ArrivingArms(service, [arm] if arm else list(config.arms), neighbours=neighbours)
        arms.begin()
        threading.Thread(target=arms.follow, name="arms", daemon=True).start()
        run_server_with(service, listening, host)
        if not arms.end(_GRACE):
            # A thread that loads an arm would meet an interpreter that is being taken down, and abort the process.
            service.run.close()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def _keep_out(workdir: Path) -> None:
    """Keeps compiled programs out of a work directory that is another process's now."""
    cache = jax.config.jax_compilation_cache_dir
    if cache and Path(cache).is_relative_to(workdir.absolute()):
        jax.config.update("jax_compilation_cache_dir", None)


def run_server_with(service: Service, listening, host: str) -> None:
    """Says where the server is, and serves."""
    key = bool(service.options.api_key)
    if host not in LOOPBACK and not key:
        console.print(
            f"anyone who reaches {host} can use it: set {KEY_VARIABLE} or --api_key", style="yellow", soft_wrap=True
        )

    def say(address: str) -> None:
        names = ", ".join(service.arms) or "none yet"
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
