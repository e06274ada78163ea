"""What the tests of experiments/ share: results that nobody ran, and inputs over few scenes."""

import json

from eim_jax.config import from_config_dict
from eim_jax.training import setup as loading
from experiments import results
from experiments.cells import FAMILIES


def few_scenes(one, folder):
    """The inputs of a cell's config over 60 scenes."""
    module = FAMILIES[one.row.family].configs["miniature"]
    values = {**one.overrides, "data.scenes": 60}
    return loading.load(from_config_dict(with_overrides(module.get_config(), values)), folder)


def with_overrides(config, overrides):
    """The config, changed in place."""
    config.update_from_flattened_dict(overrides)
    return config


def result(items=None, scores=None, seed=0, row="", seconds=0.1, **more):
    """A cell's result as the runner keeps it."""
    curves = {
        "step": [25, 50],
        "loss": [2.0, 1.0],
        "loss/base": [2.0, 1.0],
        "loss/ie": [3.0, 2.5],
        "queue/ie/recall1": [0.1, 0.2],
        "queue/ie/effective": [90.0, 80.0],
    }
    stage = {
        "name": "ie",
        "losses": {"base": 1.0, "ie": 1.0},
        "steps": 600,
        "epochs": 4.0,
        "batch": 40,
        "trained_params": 9,
        "seconds": 60.0,
        "seconds_per_step": seconds,
        "peak_memory_bytes": 1,
        "curves": curves,
    }
    return {
        "row": row,
        "seed": seed,
        "budget": "steps",
        "file": "configs/miniature.py",
        "overrides": {"seed": seed},
        "versions": {"jax": "0"},
        "machine": {"cpu_cores": 2},
        "date": "2026-11-21",
        "decoding": "greedy",
        "seconds": 60.0,
        "scores": scores or {},
        "items": items or {"ids": []},
        "stages": [stage],
        "examples": {"test-0-1": "a red <circle>", "test-0-2": "two stars"},
        **more,
    }


def write(out, one, **more):
    """Writes a result where the cell's is looked for, and returns it."""
    found = result(seed=one.seed, row=one.row.name, scores={"Bleu_4": 0.3}, **more)
    target = results.path(out, one)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found))
    return found
