"""What a config may hold: ranges, choices, and the fields that must agree with each other."""

import math
import re
from typing import TYPE_CHECKING, Any

from eim_jax.config.fields import by_loss

if TYPE_CHECKING:
    from eim_jax.config import Config, Stage


class ConfigError(ValueError):
    """A field is unknown, has the wrong type, or contradicts another; the message names it and says what to do."""


_RANGES = {
    "data.max_tokens": (2, 1 << 20),
    "data.max_tokens_text_only": (0, 1 << 20),
    "data.threads": (0, 1024),
    "data.ignore_token": (-1, 1 << 30),
    "data.buckets": (1, 64),
    "data.length_window": (1, 1 << 20),
    "data.eval_limit": (0, 1 << 40),
    "towers.dropout": (0.0, 0.99),
    "towers.image_size": (0, 1 << 14),
    "losses.tau": (1e-6, 1e6),
    "losses.chunk": (0, 1 << 30),
    "decode.beams": (1, 1000),
    "decode.max_tokens": (1, 1 << 20),
    "decode.top_p": (0.0, 1.0),
    "decode.temperature": (1e-6, 1e6),
    "decode.batch": (1, 1 << 20),
    "checkpoint.every_steps": (1, 1 << 40),
    "checkpoint.every_minutes": (0.0, 1e6),
    "eval.every_steps": (0, 1 << 40),
    "eval.every_epochs": (0.0, 1e6),
    "eval.limit": (0, 1 << 40),
    "eval.train": (0, 1 << 40),
    "log_every": (1, 1 << 40),
    "arm.*.st_tokens": (1, 1 << 20),
    "arm.*.st_clip_length": (1, 1 << 20),
    "arm.*.st_hidden": (1, 1 << 24),
    "arm.*.st_layers": (1, 1 << 12),
    "arm.*.st_heads": (1, 1 << 12),
    "arm.*.prompts": (0, 1 << 20),
    "arm.*.prompt_hidden": (0, 1 << 24),
    "arm.*.adapter_rank": (1, 1 << 20),
    "arm.*.adapter_layers": (1, 1 << 20),
    "arm.*.adapter_temperature": (1e-6, 1e6),
    "arm.*.adapter_dropout": (0.0, 0.99),
    "arm.*.adapter_scale": (1e-6, 1e6),
    "arm.*.lora_rank": (1, 1 << 20),
    "arm.*.lora_alpha": (1e-6, 1e6),
    "arm.*.lora_dropout": (0.0, 0.99),
    "stages.*.epochs": (0, 1 << 40),
    "stages.*.steps": (0, 1 << 40),
    "stages.*.batch": (1, 1 << 30),
    "stages.*.accumulate": (1, 1 << 30),
    "stages.*.lr": (0.0, 1e30),
    "stages.*.warmup_steps": (0, 1 << 40),
    "stages.*.warmup_epochs": (0.0, 1e6),
    "stages.*.b1": (0.0, 0.9999999999),
    "stages.*.b2": (0.0, 0.9999999999),
    "stages.*.eps": (1e-30, 1.0),
    "stages.*.clip_norm": (0.0, 1e30),
    "stages.*.weight_decay": (0.0, 1e30),
}

_CHOICES = {
    "towers.remat": ("none", "dots", "full"),
    "towers.attention": ("auto", "softmax", "xla", "cudnn"),
    "towers.dtype": ("auto", "float32", "bfloat16"),
    "towers.quant": ("none", "nf4"),
    "towers.image_stats": ("clip", "imagenet"),
    "data.fit": ("crop", "stretch"),
    "data.on_bad": ("error", "drop"),
    "data.seam": ("auto", "one_string", "spaced", "apart", "tokenizer"),
    "data.cut": ("balanced", "end"),
    "data.pack": ("off", "on", "auto"),
    "data.scored": ("test", "val", "train"),
    "eval.split": ("val", "test"),
    "eval.method": ("greedy", "beam", "nucleus", "none"),
    "checkpoint.keep": ("last", "best"),
    "losses.similarity": ("cosine", "dot"),
    "losses.queue_dtype": ("auto", "float32", "bfloat16", "int8"),
    "decode.answers": ("generated", "likelihood"),
    "decode.unparsed": ("wrong", "random"),
    "stages.*.schedule": ("linear", "cosine", "constant"),
    "stages.*.eps_added": ("after", "before"),
    "stages.*.loss_mean": ("tokens", "rows", "microbatch"),
    "arm.*.visual_routing": ("sample", "position"),
    "decode.rope": ("training", "lavin"),
    "arm.*.st_bias": ("zeros", "uniform"),
}

# One of these for all losses, or by a loss's name: "self, lm:others".
_BY_LOSS = {"losses.center": ("none", "mean"), "losses.positives": ("self", "group", "mask", "others")}


def _by_pattern(flat: dict[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """The fields by their own name, and by "stages.*.lr" with any stage's or arm's name."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for name, value in flat.items():
        group, _, rest = name.partition(".")
        _, named, field = rest.rpartition(".")
        for pattern in [name, f"{group}.*.{field}"] if named else [name]:
            found.setdefault(pattern, []).append((name, value))
    return found


def check(config: "Config", flat: dict[str, Any]) -> None:
    """Raises ConfigError for the first field, of `flat` = {"data.max_tokens": 40, ...}, that cannot be meant."""
    for name, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.{name}: {value} is no finite number")
    matches = _by_pattern(flat)
    for pattern, allowed in _CHOICES.items():
        for name, value in matches.get(pattern, ()):
            if value not in allowed:
                raise ConfigError(f"config.{name}: {value!r} is none of {', '.join(allowed)}")
    for name, allowed in _BY_LOSS.items():
        for_all, named = by_loss(flat[name])
        if len(named) < flat[name].count(":"):
            raise ConfigError(f"config.{name}: {flat[name]!r} names a loss twice")
        for word in ([for_all] if for_all or not named else []) + list(named.values()):
            if word not in allowed:
                raise ConfigError(
                    f"config.{name}: {word!r} is none of {', '.join(allowed)} (for some losses alone: "
                    f"'ie:{allowed[1]}, lm:{allowed[1]}')"
                )
    for pattern, (low, high) in _RANGES.items():
        for name, value in matches.get(pattern, ()):
            if not low <= value <= high:
                raise ConfigError(f"config.{name}: {value} is not in {low} .. {high}")
    steps = re.fullmatch(r"(\d+):(\d+)", config.profile or "0:1")
    if not steps or int(steps[1]) >= int(steps[2]):
        raise ConfigError(f"config.profile: {config.profile!r} is not first:end of some steps, such as '10:15'")
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in config.mesh)
    if (
        len(config.mesh) != 3
        or not whole
        or list(config.mesh).count(-1) > 1
        or any(n == 0 or n < -1 for n in config.mesh)
    ):
        raise ConfigError(f"config.mesh: {config.mesh} is not (data, fsdp, tensor) with at most one -1")
    _check_texts(config)
    if config.checkpoint.keep == "best" and not (config.eval.every_steps or config.eval.every_epochs):
        raise ConfigError(
            "config.checkpoint.keep='best' chooses among scores while training, and there are none: set "
            "config.eval.every_epochs or config.eval.every_steps"
        )
    if not config.arms or not config.decode.methods:
        raise ConfigError("config.arms and config.decode.methods need at least one entry")
    sequences = {f"arm.{name}.sequence": arm.sequence for name, arm in config.arm.items()}
    named = {"arms": config.arms, "decode.methods": config.decode.methods, "logging": config.logging, **sequences}
    for field, entries in named.items():
        for entry in entries:
            if not isinstance(entry, str):
                raise ConfigError(f"config.{field}: {entry!a:.60} is no name")
    for method in config.decode.methods:
        if method not in ("greedy", "beam", "nucleus"):
            raise ConfigError(f"config.decode.methods: {method!r} is none of greedy, beam, nucleus")
    for name in config.arms:
        if name not in config.arm:
            raise ConfigError(f"config.arms: no arm {name!r}; config.arm has {', '.join(config.arm)}")
        arm = config.arm[name]
        if not arm.sequence:
            raise ConfigError(f"config.arm.{name}.sequence is empty: name at least one of config.stages")
        for stage in arm.sequence:
            if stage not in config.stages:
                raise ConfigError(
                    f"config.arm.{name}.sequence: no stage {stage!r}; config.stages has {', '.join(config.stages)}"
                )
            _check_stage(stage, config.stages[stage])
        _check_patterns(f"config.arm.{name}.lora", arm.lora)
        trained = [p for stage in arm.sequence for p, _ in patterns(config.stages[stage])]
        if arm.prompts and not any(re.fullmatch(pattern, "visual/prompt/tokens") for pattern in trained):
            raise ConfigError(
                f"config.arm.{name}.prompts={arm.prompts}, but no stage of its sequence trains it: it would stay as it "
                "was drawn. Leave it out, or add a stage that trains 'visual/prompt/.*'"
            )


def _check_texts(config: "Config"):
    data = config.data
    if 0 < data.max_tokens_text_only < data.max_tokens:
        raise ConfigError(
            f"config.data.max_tokens_text_only={data.max_tokens_text_only} is less than "
            f"config.data.max_tokens={data.max_tokens}: rows without a picture have more room, not less; 0 is as much"
        )
    # Runs of earlier versions ("apart") ended a text at EOS whether they had been taught to or not.
    if not data.eos and not config.decode.stop_at_period and data.seam != "apart":
        raise ConfigError(
            "config.data.eos=False teaches no end of a text, and config.decode.stop_at_period=False ends none: set "
            "config.decode.stop_at_period=True (ClipCap's rule), or config.data.eos=True"
        )


def patterns(stage: "Stage") -> list[tuple[str, float]]:
    """The stage's (pattern, factor) entries; raises ConfigError for an entry of another form."""
    found = []
    for entry in stage.train:
        pair = (entry, 1.0) if isinstance(entry, str) else entry
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and _positive(pair[1])):
            raise ConfigError(
                f"train entry {entry!r} is neither a pattern nor a (pattern, learning-rate factor > 0) pair: "
                "write train=\"('st/.*', ('lm/.*', 0.1))\""
            )
        try:
            re.compile(pair[0])
        except re.error as error:
            raise ConfigError(f"train pattern {pair[0]!r} is no regular expression: {error}") from error
        found.append((pair[0], float(pair[1])))
    return found


def _check_patterns(where: str, entries: tuple) -> None:
    """Raises ConfigError for an entry that is no regular expression."""
    for entry in entries:
        if not isinstance(entry, str):
            raise ConfigError(f"{where}: {entry!a:.60} is no pattern: write \"('lm/blocks.*/attn/(q|v)',)\"")
        try:
            re.compile(entry)
        except re.error as error:
            raise ConfigError(f"{where}: {entry!r} is no regular expression: {error}") from error


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e30


def _check_stage(name: str, stage: "Stage"):
    where = f"config.stages.{name}"
    try:
        patterns(stage)
    except ConfigError as error:
        raise ConfigError(f"{where}.train: {error}") from error
    weights = stage.losses.values()
    if not any(weights):
        raise ConfigError(f"{where}.losses: every weight is 0; a stage needs at least one loss")
    if min(weights) < 0:
        raise ConfigError(f"{where}.losses: a weight is negative")
    if not stage.train:
        raise ConfigError(f"{where}.train is empty: a stage trains at least one pattern")
    if stage.accumulate < 1 or stage.batch % stage.accumulate:
        raise ConfigError(f"{where}.accumulate={stage.accumulate} does not divide {where}.batch={stage.batch}")
    if stage.decay_also:
        if not stage.weight_decay:
            raise ConfigError(f"{where}.decay_also names leaves to decay, but {where}.weight_decay is 0: set it too")
        try:
            re.compile(stage.decay_also)
        except re.error as error:
            raise ConfigError(f"{where}.decay_also: {stage.decay_also!r} is no regular expression: {error}") from error
    if stage.loss_mean == "microbatch" and stage.accumulate == 1:
        raise ConfigError(
            f"{where}.loss_mean='microbatch' is a mean over micro-batches, and there is one: set {where}.accumulate too"
        )
    if stage.steps <= 0 and stage.epochs <= 0:
        raise ConfigError(f"{where}: epochs or steps must be positive")
    if problem := warmup_problem(stage):
        raise ConfigError(f"{where}.{problem}")


def warmup_problem(stage: "Stage", per_epoch: int | None = None) -> str | None:
    """Says of a warm-up that leaves nothing of its stage which fields decided both lengths; else None.

    Args:
      stage: as configured.
      per_epoch: steps in an epoch; None before the data are read, where lengths in one unit alone can be compared.
    """
    if stage.warmup_epochs:
        warmup = f"warmup_epochs={stage.warmup_epochs:g} (which overrides warmup_steps={stage.warmup_steps})"
    else:
        warmup = f"warmup_steps={stage.warmup_steps}"
    length = f"steps={stage.steps} (which overrides epochs={stage.epochs})" if stage.steps else f"epochs={stage.epochs}"
    if per_epoch is not None:
        begun = round(stage.warmup_epochs * per_epoch) if stage.warmup_epochs else stage.warmup_steps
        total = stage.steps or stage.epochs * per_epoch
        warmup, length = f"{warmup} is {begun} steps, which", f"{length}, {total} steps"
    elif bool(stage.warmup_epochs) != bool(stage.steps):
        begun, total = (stage.warmup_steps, stage.steps) if stage.steps else (stage.warmup_epochs, stage.epochs)
    else:
        return None
    return f"{warmup} leaves nothing of the stage's {length}: lower it" if begun >= total else None
