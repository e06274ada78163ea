"""What each queue of a run lets a loss see: the keys' mean, the loss of a query that is its own key, and chance.

    python benchmarks/cone.py --config=configs/miniature.py

Raw and centred (`losses.center`), by the config's tau, similarity and positives; one Markdown row a queue.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from eim_jax.config import from_config_dict
from eim_jax.losses.queue_contrast import SAMPLE, contrast
from eim_jax.losses.queue_health import measure
from eim_jax.losses.queues import Queue
from eim_jax.losses.table import losses_of
from eim_jax.training import arm_model, partition, setup


def main(arguments: list[str] | None = None) -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature.py")
    parser.add_argument("--arm", default="", help="whose losses; the last one of the config")
    parser.add_argument("--scenes", type=int, default=0, help="of a drawn data set, in place of the config's")
    options = parser.parse_args(arguments)
    config = read(options.config)
    if options.scenes:
        data = dataclasses.replace(config.data, own={**config.data.own, "scenes": options.scenes})
        config = dataclasses.replace(config, data=data)
    arm = config.arm[options.arm or config.arms[-1]]
    with tempfile.TemporaryDirectory() as folder:
        inputs = setup.load(config, Path(folder))
        vlm = arm_model.model(inputs, arm)
        print(f"\n{datetime.date.today()} | {jax.default_backend()}, {os.cpu_count()} cores | jax {jax.__version__}\n")
        print("| queue | keys | mean cosine | mean key's length | own key as query, raw | centred | chance |")
        print("|---|---|---|---|---|---|---|")
        for loss in losses_of(*(config.stages[name] for name in arm.sequence)):
            if loss.queue is None:
                continue
            encode, fields = functools.partial(loss.queue.keys, vlm), loss.queue.source.fields(inputs)
            rows = Queue.build(encode, partition.unflatten(inputs.towers), fields, similarity="dot")
            told, features = {}, rows.keys[: rows.count]
            for center in ("none", "mean"):
                similarity = config.losses.similarity
                queue = Queue.of(jnp.array(features), inputs.samples.groups, similarity=similarity, center=center)
                positives = config.losses.of("positives", loss.name)
                found = contrast(queue, tau=config.losses.tau, similarity=similarity, positives=positives)
                told[center] = measure(queue), found
            (raw, between), (_, left) = told["none"], told["mean"]
            print(
                f"| {loss.queue.symbol}, {loss.title} | {raw.count:,} | {raw.mean_cosine:.3f} | {raw.mean_norm:.3f} "
                f"| {between.floor:.3f} | {left.floor:.3f} | {between.chance:.3f} |",
                flush=True,
            )
        print(f"\nThe two losses are means over up to {SAMPLE} rows against the whole queue, in nats.")


def read(file: str):
    """The run's config of a file."""
    spec = importlib.util.spec_from_file_location("config", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config())


if __name__ == "__main__":
    main()
