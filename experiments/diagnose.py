"""What a finished cell was like as its training began and after each of its stages; kept in the cell's result.

python -m experiments.diagnose --table=4 --seeds=1

On one batch of training samples, for each loss that the row trains on: alignment (mean cosine of a query and its own
key), uniformity of the queries (log of the mean of exp(-2 d^2) over pairs; Wang and Isola 2020; lower is more uniform),
and the cosine between the gradients of every two losses, over the parameters that the row trains and both reach. On
the test texts: the language model's perplexity without any image.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from eim_jax.commands.trained_arms import after_stages
from eim_jax.config import LossWeights, Stage, read_saved
from eim_jax.data import loader, tokenize
from eim_jax.data.datasets import load_split
from eim_jax.data.rows import row_options
from eim_jax.data.samples import Split
from eim_jax.losses.contrastive import as_queries
from eim_jax.losses.kinds import ContrastiveLoss, Forward
from eim_jax.losses.objective import make_objective, normalisers
from eim_jax.losses.table import losses_of, queues_of
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM
from eim_jax.training import partition
from eim_jax.training import setup as loading
from eim_jax.training.partition import Flat
from eim_jax.training.setup import Inputs
from eim_jax.utils.console import progress
from eim_jax.utils.files import write_json
from experiments import results, run
from experiments.integration import integration_rate

ROWS = 128  # samples of the batch, and of the test texts


def main(arguments: list[str] | None = None) -> None:
    """Diagnoses the finished cells asked for, those whose work directories are still there."""
    options = run.parse(arguments)
    there = [(one, run.workdir_of(options.runs, one)) for one in run.cells(run.chosen(options), options)]
    there = [(one, workdir) for one, workdir in there if results.read(options.out, one) and workdir.exists()]
    with progress("diagnoses", len(there), "cells") as advance:
        for one, workdir in there:
            inputs = loading.load(read_saved(workdir), workdir)
            test = load_split(inputs.config, "test", workdir)
            write_json(workdir / one.row.arm / "diagnostics.json", diagnose(inputs, one.row.arm, test))
            results.add(options.out, one, "diagnostics", results.load(workdir / one.row.arm / "diagnostics.json"))
            advance(1)


def diagnose(inputs: Inputs, arm: str, test: Split) -> list[dict]:
    """One record for the start and each stage.

    Its keys: "after", "perplexity", "integration", "queries" {loss: ...}, "cosines" {pair: ...}.
    """
    sequence = [inputs.config.stages[name] for name in inputs.config.arm[arm].sequence]
    losses = losses_of(*sequence)
    names = [loss.name for loss in losses]
    every = tuple(dict.fromkeys(pattern for stage in sequence for pattern, _ in partition.patterns(stage)))
    found = []
    for after, vlm, params in after_stages(inputs, arm):
        if not found:  # compiled once for all stages
            batch, quiet = _batch(inputs, vlm), _texts(inputs, vlm, test)
            queues = {kind.name: inputs.queue(vlm, kind) for kind in queues_of(*sequence)}
            train = {name: Stage(train=every, losses=LossWeights(**{name: 1.0}), batch=ROWS) for name in names}
            gradients = {name: gradient(inputs, vlm, stage) for name, stage in train.items()}
            base = Stage(train=every, losses=LossWeights(base=1.0), batch=ROWS)
            nats = jax.jit(objective(inputs, vlm, base))
            contrasts = [loss for loss in losses if loss.queue is not None]
            asked = {loss: jax.jit(functools.partial(query, inputs, vlm, loss)) for loss in contrasts}
        trained, frozen = partition.split(params, partition.groups(base, params))
        slopes = {name: slope(trained, frozen, batch, queues) for name, slope in gradients.items()}
        cosines = {f"{a}·{b}": cosine(slopes[a], slopes[b]) for a, b in itertools.combinations(names, 2)}
        spreads = {}
        for loss, ask in asked.items():
            rows = np.asarray(batch.has_image) if loss.needs_image else np.ones(len(batch.index), bool)
            queue, said = queues[loss.queue.name], ask(params, batch)
            if queue.center is not None:
                said = as_queries(said, inputs.config.losses.similarity, queue.center)
            spreads[loss.name] = spread(np.asarray(said)[rows], np.asarray(queue.keys[batch.index])[rows])
        found.append(
            {
                "after": after,
                "perplexity": float(np.exp(nats(params, quiet, {}))),
                "integration": integration_rate(vlm, partition.unflatten(params), batch),
                "queries": spreads,
                "cosines": {pair: value for pair, value in cosines.items() if value is not None},
            }
        )
    return found


def objective(inputs: Inputs, vlm: VLM, stage: Stage) -> Callable[[Flat, Batch, dict], jax.Array]:
    """(parameters, batch, queues) -> the stage's loss, without dropout."""
    settings = replace(inputs.config.losses, negatives="queue")  # whatever the row trained against
    loss = make_objective(vlm, stage, settings, inputs.mesh)

    def of(params: Flat, batch: Batch, queues: dict) -> jax.Array:
        return loss(partition.unflatten(params), batch, queues, normalisers(vlm, stage, batch), None)[0]

    return of


def gradient(inputs: Inputs, vlm: VLM, stage: Stage) -> Callable[..., Flat]:
    """(trained, frozen, batch, queues) -> the loss's gradient with respect to what is trained."""
    loss = objective(inputs, vlm, stage)
    return jax.jit(jax.grad(lambda trained, frozen, *rest: loss({**trained, **frozen}, *rest)))


def cosine(a: Flat, b: Flat) -> float | None:
    """Between two gradients, over the leaves that both reach; None where there is none."""
    shared = [path for path in a if bool(jnp.any(a[path])) and bool(jnp.any(b[path]))]
    if not shared:
        return None
    x, y = (np.concatenate([np.asarray(flat[path], np.float64).ravel() for path in shared]) for flat in (a, b))
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def query(inputs: Inputs, vlm: VLM, loss: ContrastiveLoss, params: Flat, batch: Batch) -> jax.Array:
    """The queries [b D] of a loss."""
    return loss.query(Forward(vlm, inputs.config.losses, partition.unflatten(params), batch))


def spread(found: np.ndarray, keys: np.ndarray) -> dict[str, float]:
    """Alignment and uniformity of queries [b D] and their keys [b D]."""
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found.astype(np.float64), keys.astype(np.float64)))
    squares = 2 - 2 * (q @ q.T)[np.triu_indices(len(q), 1)]
    return {
        "alignment": float(np.sum(q * k, axis=1).mean()),
        "uniformity": float(np.log(np.exp(-2 * squares).mean())),
    }


def _batch(inputs: Inputs, vlm: VLM) -> Batch:
    """Training samples, whole."""
    settings = inputs.config.data
    made = loader.batches(
        inputs.train,
        inputs.encoded,
        fields={"image", "has_image", "tokens", "valid", "supervised"},
        batch_size=min(ROWS, len(inputs.train)),
        seed=0,
        epochs=1,
        image_size=vlm.visual.config.image_size,
        fit=settings.fit,
        threads=settings.threads,
    )
    batch = next(made)
    made.close()
    return jax.tree.map(jnp.asarray, batch)


def _texts(inputs: Inputs, vlm: VLM, test: Split) -> Batch:
    """Test texts, evenly spaced, no image shown."""
    settings, number = inputs.config.data, min(ROWS, len(test))
    samples = tuple(test.samples[i * len(test) // number] for i in range(number))
    alone = Split(test.name, tuple(replace(sample, image=None) for sample in samples), test.images)
    encoded = tokenize.encode_split(
        alone, inputs.lm_tokenizer, settings.max_tokens, settings.eos, **row_options(settings)
    )
    size = vlm.visual.config.image_size
    return Batch(
        index=jnp.arange(number),
        tokens=jnp.asarray(encoded.tokens),
        valid=jnp.asarray(encoded.valid),
        supervised=jnp.asarray(encoded.supervised),
        image=jnp.zeros((number, size, size, 3), jnp.uint8),
        has_image=jnp.zeros(number, bool),
    )


if __name__ == "__main__":
    main()
