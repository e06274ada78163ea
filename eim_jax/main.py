"""The one door: `python -m eim_jax.main --config=configs/miniature.py --workdir=runs/miniature`."""

import dataclasses
import shlex
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

import jax
from absl import app, flags, logging

from eim_jax import config as settings
from eim_jax.commands import command_line, errors
from eim_jax.commands.help import MODES
from eim_jax.parallel import processes, signals
from eim_jax.utils.console import console, duration, shown
from eim_jax.utils.files import user_path
from eim_jax.utils.this_machine import machine, seconds_alive, versions

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything it writes; plan and prepare need none.")
_MODE = flags.DEFINE_enum("mode", "train", tuple(MODES), "What to do.")
_IMAGES = flags.DEFINE_string("images", "", "Image files or folders, separated by commas.")
_IMAGE = flags.DEFINE_string("image", "", "The image to talk about; none by default.")
_INIT = flags.DEFINE_string(
    "init",
    "",
    "A checkpoint (ours, ClipCap's, LLaMA-Adapter's, LaVIN's): training starts from it, as by --config.init; eval, "
    "caption, chat and export use it as it is, in place of a finished run.",
)
_ARM = flags.DEFINE_string("arm", "", "Which arm: by default the last one, for plan and serve all.")
_OUT = flags.DEFINE_string(
    "out",
    "",
    "Where to write: for caption a JSON file (<workdir>/captions.json), for plan a JSON file, for prepare and export a "
    "folder.",
)
_SAMPLES = flags.DEFINE_integer(
    "samples", None, "For inspect the training samples to show (4), for plan the number of them, N.", lower_bound=1
)
_NEIGHBOURS = flags.DEFINE_boolean(
    "neighbours", False, "Also the nearest rows of each loss's queue, which is built where it is not there."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "v5e:4x4, v5p:2x2x2, gpu:h100x8, gpu:h100x2x8 (two hosts), cpu:8; else what is here."
)
_STAGES = flags.DEFINE_list("stages", [], "These stages alone, separated by commas; all by default.")
_MERGE = flags.DEFINE_boolean(
    "merge", False, "Also the towers that have low-rank terms (LoRA) as folders, the terms inside their weights."
)
_TABLE = flags.DEFINE_boolean("table", False, "Where every parameter lies, instead of the stages' costs.")
_MESHES = flags.DEFINE_boolean(
    "meshes", False, "Every mesh (data, fsdp, 1) compiled in place of config.mesh, and which of them to take."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Several processes without SLURM, Open MPI, Kubernetes or a TPU pod: HOST:PORT of process 0."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat",
    processes.HEARTBEAT,
    "Seconds after which a silent process is lost and all others end.",
    lower_bound=5,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ("float32", "bfloat16", "float16"), "For export: of the weights in the models' folders."
)
_SHARD = flags.DEFINE_string("shard", "5GB", "For export: the largest file of weights; more are several files.")
_PUSH = flags.DEFINE_string(
    "push", "", "For export: USER/NAME on the Hugging Face hub, to which the folder with its model card is uploaded."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "For serve: where to listen; 0.0.0.0 opens it to the network.")
_PORT = flags.DEFINE_integer("port", 8000, "For serve: 0 takes a free one.", lower_bound=0, upper_bound=65535)
_API_KEY = flags.DEFINE_string(
    "api_key",
    "",
    "For serve: requests must carry it; EIM_JAX_API_KEY in the environment does the same, unseen.",
)
_MAX_WAITING = flags.DEFINE_integer(
    "max_waiting", 256, "For serve: requests that may wait for a place in the batch.", lower_bound=1
)
_MAX_BODY = flags.DEFINE_integer("max_body", 20, "For serve: the largest request, in MiB.", lower_bound=1)
_IGNORE_TEXT = flags.DEFINE_boolean(
    "ignore_text", False, "For serve: a run that captions passes over the words beside a picture, and refuses none."
)
_TRACEBACK = flags.DEFINE_boolean("traceback", False, "Show where an error arose.")


def main(argv: list[str]) -> None:
    """Prepares the process, then runs the mode."""
    if len(argv) > 1 and _MODE.value not in ("caption", "chat"):
        raise app.UsageError(f"unexpected argument {argv[1]!r}: flags start with --")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # libraries' notes on absent accelerators are no news to a newcomer
    if _MODE.value == "prepare":
        _prepare()
        return
    if _MODE.value == "plan":
        _plan()
        return
    workdir = user_path(_WORKDIR.value) if _WORKDIR.value else None
    config = _config(workdir, _MODE.value)
    processes.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _HEARTBEAT.value)
    if (
        _MODE.value in ("chat", "inspect", "export", "serve")
        and jax.distributed.is_initialized()
        and jax.process_count() > 1
    ):
        raise settings.ConfigError(f"--mode={_MODE.value} is for one process: run it on one host alone")
    if jax.config.jax_compilation_cache_dir is None:  # JAX_COMPILATION_CACHE_DIR says otherwise
        # Compiled programs are kept: a resumed run starts in seconds.
        cache = user_path(config.data.cache) if config.data.cache else workdir / "cache" if workdir else None
        if cache is not None:
            jax.config.update("jax_compilation_cache_dir", str((cache / "xla").absolute()))
    if _MODE.value in ("train", "eval", "inspect"):
        assert workdir is not None, "these modes write into it, and _config asked for it"
        _run_on_data(config, workdir)
    elif _MODE.value == "serve":
        assert workdir is not None, "it serves what a work directory holds, and _config asked for it"
        _serve(config, workdir)
    else:
        _use(config, workdir, argv[1:])


def _run_on_data(config: settings.Config, workdir: Path) -> None:
    """The modes that read the data set."""
    # Imported only now: the settings above come before anything that touches a device.
    from eim_jax.commands import evaluate, inspection, train

    if _MODE.value == "inspect":
        inspection.inspect(config, workdir, _arm(config), _SAMPLES.value or 4, _NEIGHBOURS.value)
    elif _MODE.value == "eval":
        evaluate.evaluate(config, workdir, _record(config) if _INIT.value else None)
    else:
        started = time.monotonic()
        train.train(config, workdir, _record(config))
        console.print(f"done in {duration(time.monotonic() - started)}", soft_wrap=True)


def _use(config: settings.Config, workdir: Path | None, places: list[str]) -> None:
    """The modes that use an arm: that of the work directory as it was trained, or what --init holds."""
    from eim_jax.commands import caption, chat, exporting, trained_arms

    init = bool(_INIT.value)
    if init and workdir is not None:
        trained_arms.check_untrained(config, workdir)
    if _MODE.value == "caption":
        if not _IMAGES.value and not places:
            raise app.UsageError("--mode=caption needs images: FILE_OR_FOLDER ..., or --images=FILE_OR_FOLDER,...")
        out = user_path(_OUT.value) if _OUT.value else workdir / "captions.json" if workdir else None
        images = [*caption.places_of(_IMAGES.value), *(caption.place_of(place) for place in places)]
        caption.caption(config, workdir, _arm(config), images, out, init=init)
    elif _MODE.value == "export":
        if not _OUT.value:
            raise app.UsageError("--mode=export needs --out=FOLDER")
        weights = exporting.Weights(_DTYPE.value, _SHARD.value)
        out = user_path(_OUT.value)
        exporting.export(
            config, workdir, _arm(config), out, init=init, merge=_MERGE.value, weights=weights, push=_PUSH.value
        )
    else:
        if len(places) + bool(_IMAGE.value) > 1:
            raise app.UsageError("--mode=chat is about one image: give one, or /image FILE in the conversation")
        image = "".join(places) or _IMAGE.value
        chat.chat(config, workdir, _arm(config), user_path(image) if image else None, init=init)


def _serve(config: settings.Config, workdir: Path) -> None:
    """The mode that answers requests until it is stopped."""
    try:
        from eim_jax.commands import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "anyio"):
            raise
        raise settings.ConfigError(
            f"--mode=serve needs {error.name}, which is not installed: pip install '.[train,serve]' in eim_jax's folder"
        ) from None
    host = _HOST.value
    options = serve.options_of(host, _API_KEY.value, _MAX_WAITING.value, _MAX_BODY.value, _IGNORE_TEXT.value)
    serve.serve(
        config, workdir, _arm(config) if _ARM.value else "", host, _PORT.value, options, neighbours=_NEIGHBOURS.value
    )


def _record(config: settings.Config) -> dict:
    """What run.json says of a run from outside."""
    return {
        "command": _command(),
        "config": settings.as_dict(config),
        "versions": versions(),
        "machine": machine(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _plan() -> None:
    """--mode=plan: reads no data, allocates no weight, writes nothing but --out."""
    if flags.FLAGS.config is None:
        raise app.UsageError("--config is missing: --mode=plan says what a config's stages cost")
    from eim_jax.commands import plan

    config = _asked()
    plan.plan(
        config,
        _TOPOLOGY.value,
        command=_command(),
        arms=(_arm(config),) if _ARM.value else (),
        stages=_STAGES.value,
        samples=_SAMPLES.value or 0,
        out=user_path(_OUT.value) if _OUT.value else None,
        table=_TABLE.value,
        meshes=_MESHES.value,
    )


def _prepare() -> None:
    """Writes a data set's shards: no model, no workdir, no device."""
    if flags.FLAGS.config is None or not _OUT.value:
        raise app.UsageError("--mode=prepare needs --config=FILE, whose data is prepared, and --out=FOLDER")
    from eim_jax.commands import prepare

    prepare.prepare(_asked(), user_path(_OUT.value))


def _command() -> str:
    return shlex.join(["python", "-m", "eim_jax.main", *sys.argv[1:]])


def _config(workdir: Path | None, mode: str) -> settings.Config:
    """The config asked for; of commands on a run, the one it was trained with (command_line.py)."""
    if _INIT.value and mode == "serve":
        raise settings.ConfigError(
            "--mode=serve serves a finished run, and takes no --init: ask a checkpoint by --mode=chat or caption, or "
            "train from it (--mode=train --init=...) and serve that run"
        )
    if workdir is None:
        if not (_INIT.value and mode in ("caption", "chat", "export")):
            raise app.UsageError("--workdir is missing: --workdir=runs/NAME keeps everything that the run writes")
        if flags.FLAGS.config is None:
            raise app.UsageError("--config is missing: --init needs the config whose arm the checkpoint is to fill")
        return _asked()
    if flags.FLAGS.config is None:
        if mode == "train":
            raise app.UsageError("--config is missing: --config=miniature trains the embedded example")
        raise app.UsageError(f"{workdir} holds no run: --mode={mode} needs the workdir of a trained one, or --config")
    from eim_jax.training import kinds

    config, saved = _asked(), settings.read_saved(workdir)
    if saved is not None:
        changed = kinds.differences(saved, config)
        if changed:
            lines = "\n  ".join(changed)
            raise settings.ConfigError(
                f"{workdir} belongs to a run with another config:\n  {lines}\n"
                "Choose another --workdir, or delete this one to start again."
            )
    return config


def _asked() -> settings.Config:
    """The command line's config, checked by its structure and by the kinds that it names."""
    from eim_jax.training import kinds

    config = settings.from_config_dict(flags.FLAGS.config)
    if _INIT.value:
        config = dataclasses.replace(config, init=_INIT.value)
    kinds.check(config)
    return config


def _arm(config: settings.Config) -> str:
    name = _ARM.value or config.arms[-1]
    if name not in config.arms:
        raise app.UsageError(f"--arm={name}: this run has {', '.join(config.arms)}")
    return name


def _parse(argv: list[str]) -> list[str]:
    # Run by `python -m`, this module is registered under the file's name.
    own = flags.FLAGS.find_module_defining_flag(_MODE.name)
    return command_line.parse(argv, flags.FLAGS.flags_by_module_dict()[own])


def cli() -> None:
    """Runs `main`; an error that names what is wrong with the input is one message, not a traceback."""

    def run_main(argv: list[str]) -> None:
        try:
            main(argv)
            processes.finish()
        except app.UsageError as error:
            raise app.UsageError(shown(str(error))) from None
        except Exception as error:
            message = (
                traceback.format_exc() if _TRACEBACK.value else errors.in_words(error, _WORKDIR.value or _OUT.value)
            )
            if message is None and jax.distributed.is_initialized():
                message = traceback.format_exc()
            if message is None:
                raise
            _fail(message)
        except SystemExit as stop:
            if getattr(stop, "together", False):
                processes.finish()
            elif stop.code:
                _fail(stop.code)
            raise
        except BaseException:
            if jax.distributed.is_initialized():
                _fail(traceback.format_exc())
            raise

    signals.began(seconds_alive())
    continues = command_line.given(sys.argv, "mode") in (None, "train", "prepare")
    try:
        with signals.handled(f"the same command {'continues' if continues else 'starts again'}"):
            app.run(run_main, flags_parser=_parse)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.exit(shown(stop.code))
        raise


def _fail(message: str | int) -> None:
    """Exits with an error; one of several processes at once, without waiting for others that wait for it."""
    if jax.distributed.is_initialized():
        print(shown(processes.named(str(message))), file=sys.stderr)
        processes.leave(1)
    sys.exit(message)


if __name__ == "__main__":
    cli()
