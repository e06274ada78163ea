"""Where every array lies: one mesh, ordered path rules for parameters, one table that shows the result."""

import math
import re
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # batches and queues are split by row over both

P = PartitionSpec
COLUMN = P("fsdp", "tensor")  # kernel [in, out] whose outputs are split: qkv, up, projections
ROW = P("tensor", "fsdp")  # kernel [in, out] whose inputs are split, after a COLUMN: out, down

# (regex on the whole path, spec), first match wins. In a scanned stack ("blocks/...") the layer axis comes first.
# What is added to the residual stream, or reads it without a ROW behind, is not split over "tensor": the stream would
# take over that split, and every block would gather it again.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Deep prompts: one slice a layer.
    (r"visual/prompt/tokens", P(None, None, "fsdp")),
    (r"visual/prompt/up/kernel", P(None, *COLUMN)),
    (r"visual/prompt/down/kernel", P(None, *ROW)),
    (r"visual/prompt/(up|down)/bias", P()),
    # Router adapters and LLaMA-Adapter's prompts: a slice a layer, small beside everything else.
    (r"(visual|lm)/adapter/(router|down)/kernel", P(None, "fsdp")),
    (r"(visual|lm)/adapter/up/kernel", P(None, None, None, None, "fsdp")),
    (r"(visual|lm)/adapter/up/bias", P(None, None, "fsdp")),
    (r"lm/adapter/modality", P(None, "fsdp")),
    (r"lm/adapter/tokens", P(None, None, "fsdp")),
    (r"(visual|lm)/adapter/.*", P()),
    # Low-rank terms x A B: A's input and B's output as the kernel's; the rank is whole everywhere.
    (r"(visual|lm)/(.*/)?qkv/lora/b", P(None, None, "tensor")),
    (r"(visual|lm)/(.*/)?(out|down)/lora/a", P("tensor")),
    (r"(visual|lm)/(.*/)?(out|down)/lora/b", P(None, "fsdp")),
    (r"(visual|lm)/(.*/)?lora/a", P("fsdp")),
    (r"(visual|lm)/(.*/)?lora/b", P(None, "tensor")),
    # Kernels in 4 bits: codes and scales lie as the kernel would.
    (r"lm/.*/(q|k|v|gate|up)/(codes|scale|scale_scale)", COLUMN),
    (r"lm/.*/(out|down)/(codes|scale|scale_scale)", ROW),
    (r"lm/.*/scale_mean", P()),
    # Embeddings.
    (r"visual/(class_embedding|pool/probe)", P()),
    (r"visual/patch_embedding/kernel", P(None, None, None, "fsdp")),
    (r"(visual|text|lm)/position_embedding(/embedding)?", P(None, "fsdp")),
    (r"(text|lm)/token_embedding(/embedding)?", P("tensor", "fsdp")),
    # Matrices of all towers and of the connector.
    (r"(visual|text|lm|st)/(.*/)?qkv/kernel", P("fsdp", None, "tensor")),  # [in, 3, out]: by heads
    (r"(visual|text|lm|st)/(.*/)?qkv/bias", P(None, "tensor")),
    (r"(visual|text|lm|st)/(.*/)?(q|k|v|gate|up|projection|head)/kernel", COLUMN),
    (r"(visual|text|lm|st)/(.*/)?(q|k|v|up)/bias", P("tensor")),
    (r"(visual|text|lm|st)/(.*/)?(out|down)/kernel", ROW),
    (r"st/(.*/)?kernel", COLUMN),
    (r"st/(.*/)?(constant|queries)", P(None, "fsdp")),
    # Vectors: norms and the remaining biases.
    (r"(visual|text|lm|st)/(.*/)?(scale|bias)", P()),
    # What losses have of their own: a head's kernels, and whatever it is.
    (r"loss/(.*/)?kernel", COLUMN),
    (r"loss/.*", P()),
)


class Row(NamedTuple):
    """One parameter's line in `table`; `bytes` is what each device holds of it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes: int


def make_mesh(shape: tuple[int, int, int] = (1, -1, 1), devices=None) -> Mesh:
    """Returns the mesh ("data", "fsdp", "tensor") over `devices` (default: all); one size may be -1, the rest.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    number = len(devices) if devices is not None else jax.device_count()
    fixed = math.prod(size for size in shape if size != -1)
    free = shape.count(-1)
    if free > 1 or fixed < 1 or (number % fixed if free else number != fixed):
        raise ValueError(
            f"config.mesh: {shape} along {', '.join(AXES)} does not fit {number} devices: the sizes must multiply to "
            f"{number}; one may be -1, all that remain"
        )
    sizes = tuple(number // fixed if size == -1 else size for size in shape)
    # Auto axes: under Explicit ones an embedding lookup and q K^T would need hand-written shardings.
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over ("data", "fsdp")."""
    return NamedSharding(mesh, P(ROWS))


def queue_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a queue over ("data", "fsdp"): each device keeps its own rows for a whole stage."""
    return NamedSharding(mesh, P(ROWS))


def parts_of(mesh: Mesh | None, axes: tuple[str, ...] = ROWS) -> int:
    """Into how many parts these mesh axes (default: those of rows) split a dimension; 1 without a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes) if mesh is not None else 1


def rows_of_each(count: int, mesh: Mesh | None) -> int:
    """Rows that each device holds of a queue of `count` samples; the last ones may be padding.

    On GPUs a multiple of 8: of other numbers XLA makes a filled-up copy, of the whole queue and in every step, before
    cuBLAS multiplies (tests/test_plan_gpu.py).
    """
    held = -(-count // parts_of(mesh))
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    return held + -held % 8 if platform == "gpu" else held


def by_row(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keeps an activation's rows [b ...] over ("data", "fsdp") and all else of it whole, inside a jitted function.

    Without it XLA may let a parameter's split decide: a language model that starts from an embedding table split by
    width would split every activation by width and hold all rows on all devices. Rows that do not divide are left
    alone, as is everything without a mesh.
    """
    if mesh is None or x.shape[0] % parts_of(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def whole_over_fsdp(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns where the parameter at `path` lies while it is used: as its rule says, gathered over "fsdp"."""
    parts = [(axes,) if isinstance(axes, str) else axes or () for axes in param_spec(path, shape, mesh)]
    return NamedSharding(mesh, P(*(tuple(axis for axis in axes if axis != "fsdp") or None for axes in parts)))


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the spec of the parameter at `path`.

    An axis that does not divide its dimension splits another dimension that the rule splits, if it divides that one
    (GPT-2's 50,257 x 768 embedding over "tensor": its width), and else nothing.

    Raises ValueError for a path that no rule matches, and for a spec longer than the shape.
    """
    spec = next((spec for pattern, spec in RULES if re.fullmatch(pattern, path)), None)
    if spec is None:
        raise ValueError(
            f"no sharding rule matches the parameter {path!r} {shape}: add one to eim_jax/parallel/sharding.py"
        )
    if "/blocks/" in path and len(spec):
        spec = P(None, *spec)
    if len(spec) > len(shape):
        raise ValueError(f"the sharding rule of {path!r} gives {spec}, longer than its shape {shape}")
    wanted = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
    split = [() for _ in wanted]

    def divides(axis, i):
        return shape[i] % math.prod(mesh.shape[a] for a in (*split[i], axis)) == 0

    homeless = []
    for i, axes in enumerate(wanted):
        for axis in axes:
            if divides(axis, i):
                split[i] += (axis,)
            else:
                homeless.append(axis)
    for axis in homeless:
        i = next((i for i, axes in enumerate(wanted) if axes and divides(axis, i)), None)
        if i is not None:
            split[i] += (axis,)
    return P(*((axes[0] if len(axes) == 1 else axes or None) for axes in split))


def param_shardings(flat_params: dict, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns path -> sharding for a flat {path: array or ShapeDtypeStruct}."""
    return {path: NamedSharding(mesh, param_spec(path, leaf.shape, mesh)) for path, leaf in flat_params.items()}


def shard_params(flat_params: dict, mesh: Mesh) -> dict[str, jax.Array]:
    """Places a flat {path: array} on the mesh by RULES."""
    return jax.device_put(flat_params, param_shardings(flat_params, mesh))


def table(flat_params: dict, mesh: Mesh) -> list[Row]:
    """Returns one row a parameter, in path order: what a reader, `plan` and a golden test look at."""
    rows = []
    for path, sharding in sorted(param_shardings(flat_params, mesh).items()):
        leaf = flat_params[path]
        local = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows.append(Row(path, tuple(leaf.shape), str(leaf.dtype), sharding.spec, local))
    return rows
