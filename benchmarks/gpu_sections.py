"""The sections of benchmarks/gpu.py, each a generator of rows; gpu.py runs them in processes of their own."""

import functools
import gc
from collections.abc import Iterator

import clipcap_case
import jax
import jax.numpy as jnp
import lavin_case
import numpy as np
from gpu_rows import FULL, Setting, TorchPeak, fill, fill_share, jax_step, memory, modes_of, torch, torch_side
from step_case import buffers, unit_keys
from timing import DevicePeak, Side, measure, rates

from eim_jax.generation.sampler import DecodeConfig, generate
from eim_jax.losses.contrastive import queue_nce
from eim_jax.losses.queues import compress
from eim_jax.models.language.gpt2 import GPT2

if torch is not None:
    import torch_lavin
    import torch_steps
    import transformers

TAU = 0.07


def rates_section(setting: Setting) -> Iterator[dict]:
    """The device's own rates, by JAX and by PyTorch."""
    n, size = setting.numbers, setting.dtype
    yield {"case": "matmul and copy", "ours": rates(n["matmul"], n["copy"], jnp.dtype(size))}
    if torch is not None and setting.modes:
        square = torch.randn(n["matmul"], n["matmul"], device=setting.device).to(getattr(torch, size))
        line = torch.randn(n["copy"] // square.element_size(), device=setting.device).to(square.dtype)
        target = torch.empty_like(line)
        work = {"matmul": lambda: square @ square, "copy": lambda: target.copy_(line)}
        times = setting.measure({name: torch_side(setting, run) for name, run in work.items()})
        found = {"matmul_flops_per_s": 2 * n["matmul"] ** 3 / min(times["matmul"])}
        found["copy_bytes_per_s"] = 2 * line.nbytes / min(times["copy"])
        yield {"case": "matmul and copy in PyTorch", "ours": {}, "torch": {"eager": found}}


def queue_section(setting: Setting) -> Iterator[dict]:
    """Loss and gradient against N keys; PyTorch reads the very same keys."""
    (b, width), dtype = setting.numbers["queue"], jnp.dtype(setting.dtype)
    for number in setting.numbers["keys"]:
        with DevicePeak() as peak:
            keys = jax.block_until_ready(unit_keys((number, width), dtype, jax.random.key(0, impl="rbg")))
            query = jax.random.normal(jax.random.key(1), (b, width), jnp.float32)
            index = jnp.arange(b) * (number // b)

            made, (value, gradient) = _queue_loss(query, keys, None, index)
        sides = {"ours": Side(functools.partial(made, query, keys, None, index))}
        row = {"case": f"N = {number:,}, B = {b}, D = {width}", "ours": memory(buffers(made), peak), "torch": {}}
        row["ours"]["loss"] = float(value)
        for mode in modes_of(setting):
            sides[mode], row["torch"][mode] = _torch_queue(setting, mode, query, keys, index, gradient)
        fill(row, setting.measure(sides), b)
        over = _floor(row, keys.nbytes, setting)
        if number == FULL["keys"][0]:
            row["target"] = setting.target("<= 1.5 x the memory floor", over, over <= 1.5)
        if keys.nbytes < 64 << 20:
            row["note"] = "the keys fit in the cache, which the floor knows nothing of"
        yield row
        del sides
        with DevicePeak() as peak:
            codes, scale = jax.block_until_ready(jax.jit(compress, static_argnums=1)(keys, jnp.int8))
            del keys
            made, (value, coarse) = _queue_loss(query, codes, scale, index)
        row = {"case": f"int8 keys, N = {number:,}, B = {b}, D = {width}", "ours": memory(buffers(made), peak)}
        row |= {"torch": {}}
        error = jnp.linalg.norm(coarse - gradient) / jnp.linalg.norm(gradient)
        row["ours"] |= {"loss": float(value), "gradient_differs": float(error)}
        fill(row, setting.measure({"ours": Side(functools.partial(made, query, codes, scale, index))}), b)
        _floor(row, codes.nbytes + scale.nbytes, setting)
        yield row


def _queue_loss(query, keys, scale, index):
    """The compiled loss with its gradient to the queries, and what it gives."""

    def loss_of(query, keys, scale, index):
        nce = queue_nce(query, keys, index, count=len(keys), tau=TAU, scale=scale)
        return nce.loss / nce.weight

    made = jax.jit(jax.value_and_grad(loss_of)).lower(query, keys, scale, index).compile()
    return made, jax.block_until_ready(made(query, keys, scale, index))


def _floor(row: dict, nbytes: int, setting: Setting) -> float:
    """Adds the time that reading the keys once takes; returns how many times as long the loss took."""
    floor = nbytes / setting.peak["copy_bytes_per_s"]
    over = row["ours"]["seconds"] / floor
    row["ours"] |= {"floor_seconds": floor, "share": 1 / over, "share_of": "memory floor"}
    return over


def _torch_queue(setting, mode, query, keys, index, gradient) -> tuple[Side, dict]:
    shared = torch.from_dlpack(keys)
    theirs = torch.tensor(np.asarray(query), device=setting.device, requires_grad=True)
    rows = torch.tensor(np.asarray(index), device=setting.device).long()
    work = torch.compile(torch_steps.queue_loss, dynamic=False) if mode == "compiled" else torch_steps.queue_loss

    def run():
        theirs.grad = None
        loss = work(theirs, shared, rows)
        loss.backward()
        return loss

    with TorchPeak(setting) as peak:
        loss = float(run().detach())
    error = np.linalg.norm(theirs.grad.float().cpu().numpy() - np.asarray(gradient)) / np.linalg.norm(gradient)
    return torch_side(setting, run), {"loss": loss, "gradient_differs": float(error), **peak.found}


def clipcap_section(setting: Setting) -> Iterator[dict]:
    """ClipCap-EIM's three stages."""
    size = clipcap_case.SIZES[setting.size]
    for stage in ("ie", "lm", "st"):
        for batch in setting.numbers["clipcap"]:
            case = clipcap_case.clipcap_case(size, stage, batch=batch, dtype=setting.dtype, attention=setting.attention)
            sides, row = jax_step(case, f"{stage}, batch {batch}")
            for mode in modes_of(setting):
                with TorchPeak(setting) as peak:
                    dtype = getattr(torch, setting.dtype)
                    step = torch_steps.clipcap_step(case, size, setting.device, dtype, mode == "compiled")
                    loss = float(step.run())
                sides[mode] = torch_side(setting, step.run)
                row["torch"][mode] = {"loss": loss, "trained": step.trained, **peak.found}
            fill(row, setting.measure(sides), batch)
            fill_share(row, clipcap_case.flops(case), setting)
            if stage == "ie" and "ratio" in row:
                row["target"] = setting.target(
                    ">= 1.3 x compiled PyTorch's samples/s", row["ratio"], row["ratio"] >= 1.3
                )
            yield row
            del sides
            gc.collect()


def lavin_section(setting: Setting) -> Iterator[dict]:
    """LaVIN's stages on this project's side; lavin_torch_section has the other."""
    for stage, quant, remat, accumulate, attention in setting.numbers["lavin"]:
        kind = "NF4" if quant == "nf4" else setting.dtype
        name = f"{stage}, {kind}, remat {remat}, {accumulate} micro-batch(es), attention {attention}"
        form = {"quant": quant, "remat": remat, "accumulate": accumulate, "attention": attention}
        try:
            yield _lavin_row(setting, stage, name, form)
        except Exception as error:  # a setting that does not fit leaves the others
            yield {"case": name, "ours": {}, "torch": {}, "note": f"failed: {type(error).__name__}: {error}"[:400]}
        gc.collect()


def _lavin_row(setting: Setting, stage: str, name: str, form: dict) -> dict:
    n, size = setting.numbers, lavin_case.SIZES[setting.numbers["lavin_size"]]
    case = lavin_case.lavin_case(size, stage, batch=n["lavin_batch"], dtype=setting.dtype, **form)
    sides, row = jax_step(case, name)
    fill(row, measure(sides, n["rounds"], 0.0), n["lavin_batch"])
    work = lavin_case.flops(case, size.length)
    needed = work["forward"] + work["backward"]
    if case.arguments[3].supervised is not None:  # step_case supervises half of a text; the head reads nothing else
        idle = case.arguments[3].tokens.size // 2
        needed -= 4 * idle * size.lm.width * size.lm.vocab
    fill_share(row, needed, setting)
    share = row["ours"]["share"]
    row["ours"]["share_with_recomputation"] = share * (needed + work["recomputed"]) / needed
    if stage == "adapter" and form["quant"] == "none":
        row["target"] = setting.target(">= 45 % of the matmul peak", share, share >= 0.45)
    return row


def lavin_torch_section(setting: Setting) -> Iterator[dict]:
    """LaVIN's stages in PyTorch, alone on the device; NF4 there needs a package that is not asked for."""
    n, size = setting.numbers, lavin_case.SIZES[setting.numbers["lavin_size"]]
    modes = modes_of(setting)
    for stage in dict.fromkeys(stage for stage, quant, *_ in n["lavin"] if quant == "none"):
        form = {"quant": "none", "accumulate": 1, "dtype": setting.dtype}
        case = lavin_case.lavin_case(size, stage, batch=n["lavin_batch"], **form)
        row = {"case": f"{stage}, {setting.dtype}, blocks checkpointed", "ours": {}, "torch": {}}
        for mode in modes[:1]:
            with TorchPeak(setting) as peak:
                step = torch_lavin.lavin_step(
                    case, stage, setting.device, getattr(torch, setting.dtype), mode == "compiled"
                )
                loss = float(step.run())
            row["torch"][mode] = {"loss": loss, "trained": step.trained, **peak.found}
            fill(row, measure({mode: torch_side(setting, step.run)}, n["rounds"], 0.0), n["lavin_batch"])
            del step
            gc.collect()
        if modes:
            yield row


def decode_section(setting: Setting) -> Iterator[dict]:
    """Captions of GPT-2 after visual tokens, greedy and by beams of 5, against transformers' generate."""
    b, prefix, tokens = setting.numbers["decode"]
    config = clipcap_case.SIZES[setting.size].lm
    config = type(config)(**{**vars(config), "dtype": jnp.dtype(setting.dtype)})
    lm = GPT2(config)
    drawn = jax.jit(lm.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: x.astype(config.dtype), drawn)
    visual = jax.random.normal(jax.random.key(1), (b, prefix, config.width)).astype(config.dtype)
    for name, chosen in (("beam 5", DecodeConfig("beam", 5, tokens)), ("greedy", DecodeConfig("greedy", 1, tokens))):
        work = functools.partial(generate, lm, params, visual, None, None, chosen, eos_id=None)
        with DevicePeak() as peak:
            jax.block_until_ready(work())
        row = {"case": f"{name}, batch {b}, {prefix} + {tokens} tokens", "ours": {"device_peak_bytes": peak.bytes}}
        sides, row["torch"] = {"ours": Side(work)}, {}
        if modes_of(setting):
            with TorchPeak(setting) as held:
                sides["eager"] = torch_side(setting, _transformers(setting, config, visual, chosen))
                sides["eager"].wait(sides["eager"].run())
            row["torch"]["eager"] = held.found
        fill(row, setting.measure(sides), b)
        if name == "beam 5" and "ratio" in row:
            row["target"] = setting.target(">= 4 x transformers' generate", row["ratio"], row["ratio"] >= 4)
        yield row


def _transformers(setting: Setting, c, visual, chosen: DecodeConfig):
    """Transformers' generate of exactly as many tokens."""
    shape = {"vocab_size": c.vocab, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads}
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).to(setting.device, getattr(torch, setting.dtype)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    embeds = torch.from_dlpack(visual).clone()
    options = {"max_new_tokens": chosen.max_tokens, "num_beams": chosen.beams, "do_sample": False}

    def run():
        with torch.no_grad():
            found = model.generate(inputs_embeds=embeds, **options)
        if found.shape != (len(embeds), chosen.max_tokens):
            raise RuntimeError(f"generate gave {tuple(found.shape)}, not {chosen.max_tokens} tokens a row")
        return found

    return run


SECTIONS = {
    "rates": rates_section,
    "queue": queue_section,
    "clipcap": clipcap_section,
    "decode": decode_section,
    "lavin": lavin_section,
    "lavin_torch": lavin_torch_section,
}
