"""LaVIN's model of shared/originals as one of ours, its rows as batches."""

import jax
import jax.numpy as jnp
import numpy as np
from authors import arrays, group, original, placed, read_json, read_torch
from llama_model import lavin_leaves, meta_llama, openai_vision

from eim_jax.config import Arm, LossWeights, Stage
from eim_jax.models.adapters.lavin import Router
from eim_jax.models.batch import Batch
from eim_jax.models.connector import STConfig, make_st
from eim_jax.models.language.llama import Llama, LlamaConfig
from eim_jax.models.vision.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from eim_jax.models.vlm import VLM
from eim_jax.training import partition

BOS, EOS = 1, 2


class LaVIN:
    """One of the two variants: "authors", routed by position, or "batch_first", each picture by its own token."""

    def __init__(self, variant: str):
        self.folder, self.variant = original("lavin"), variant
        c = self.config = read_json(self.folder / "config.json")
        self.held = arrays(self.folder / f"{variant}.npz")
        self.inputs = arrays(self.folder / "authors.npz")
        router = Router(c["adapter_dim"], temperature=c["temperature"], dropout=0.0, scale=c["adapter_scale"])
        routing = Arm(visual_routing="position" if variant == "authors" else "sample")
        lm = LlamaConfig(
            vocab=c["vocab"], context=128, width=c["dim"], layers=c["layers"], heads=c["heads"], mlp=96,
            eps=c["norm_eps"], adapter=router, scan=True,
        )  # fmt: skip
        clip = c["clip"]
        vision = CLIPVisionConfig(
            image_size=clip["resolution"], patch_size=clip["patch"], width=clip["width"], layers=clip["layers"],
            heads=clip["heads"], mlp=4 * clip["width"], joint=48, adapter=router.in_vision(routing),
            mean=tuple(c["mean"]), std=tuple(c["std"]), scan=True,
        )  # fmt: skip
        text = CLIPTextConfig(vocab=3, context=2, width=4, layers=1, heads=1, mlp=4, joint=48)
        self.vlm = VLM(
            CLIPVision(vision),
            CLIPText(text),
            make_st(STConfig("projector", width_in=clip["width"], width_out=c["dim"], hidden=c["hidden_proj"])),
            Llama(lm),
            features="blocks",
            bos=BOS,
            with_image=tuple(self.inputs["prefix_image"].tolist()),
            without_image=tuple(self.inputs["prefix_no_image"].tolist()),
        )
        whole = meta_llama(read_torch(self.folder / "7B" / "consolidated.00.pth"), c["layers"], c["heads"])
        whole |= openai_vision(read_torch(self.folder / "clip.pt"), clip["layers"])
        self.frozen = placed(stacked(stacked(whole, "lm", c["layers"]), "visual", clip["layers"]))
        self.start = self.checkpoint("checkpoint-start.pth")
        self.params = {**self.frozen, **self.start}

    @property
    def tree(self) -> dict:
        return partition.unflatten(self.params)

    def leaves(self, held: dict) -> dict:
        """Their 93 leaves, or gradients of them, under our paths."""
        return placed(lavin_leaves(held, self.config["layers"], self.config["clip"]["layers"]))

    def checkpoint(self, file: str) -> dict:
        """The 93 of a file that their save_model wrote."""
        held = read_torch(self.folder / file)["model"]
        return self.leaves({name.removeprefix("module."): leaf for name, leaf in held.items()})

    def saved(self, prefix: str) -> dict:
        """The 93 under "prefix/" of the variant's arrays."""
        return self.leaves(group(self.held, prefix))

    def rows(self, rows: list[int]) -> Batch:
        """Rows of their data set after their truncation: what stands before the text, the model puts in itself."""
        ids, labels = self.inputs["inserted_ids"][rows], self.inputs["inserted_labels"][rows]
        pictured = self.inputs["has_image"][rows].astype(bool)
        width = ids.shape[1] - 1 - 1 - len(self.vlm.with_image)
        tokens, scored = np.zeros((2, len(rows), width), np.int32)
        for i, shown in enumerate(pictured):
            marker = self.vlm.with_image if shown else self.vlm.without_image
            before = 2 + len(marker) + (self.config["n_prompt"] if shown else 0)  # modality row and BOS
            assert ids[i, 2 : 2 + len(marker)].tolist() == list(marker)
            text = ids[i, before:]
            tokens[i, : len(text)], scored[i, : len(text)] = text, labels[i, before:] != 0
        length = width - np.argmax(tokens[:, ::-1] != 0, axis=1)
        return Batch(
            index=jnp.arange(len(rows), dtype=jnp.int32),
            tokens=jnp.asarray(tokens),
            valid=jnp.asarray(np.arange(width)[None] < length[:, None]),
            supervised=jnp.asarray(scored.astype(bool)),
            image=jnp.asarray(self.inputs["image"][rows]),
            has_image=jnp.asarray(pictured),
        )

    def prompts(self, rows: list[int]) -> Batch:
        """The rows' prompts alone, whole."""
        examples, labels = self.inputs["examples"][rows], self.inputs["labels"][rows]
        length = np.argmax(labels != 0, axis=1) - 1  # without BOS
        tokens = np.zeros((len(rows), int(length.max())), np.int32)
        for i, n in enumerate(length):
            tokens[i, :n] = examples[i, 1 : 1 + n]
        valid = np.arange(tokens.shape[1])[None] < length[:, None]
        return self.rows(rows)._replace(tokens=jnp.asarray(tokens), valid=jnp.asarray(valid), supervised=None)

    def stage(self, **fields) -> Stage:
        """Their recipe: all adapters and the projector, AdamW with decay on weights alone."""
        o = self.config["optimizer"]
        per_epoch = o["steps_per_epoch"]
        recipe = {
            "train": ("visual/adapter/.*", "lm/adapter/.*", "st/.*"), "losses": LossWeights(base=1.0), "batch": 4,
            "lr": o["lr"], "schedule": "cosine", "warmup_steps": round(o["warmup_epochs"] * per_epoch),
            "b1": o["betas"][0], "b2": o["betas"][1], "eps": o["eps"], "weight_decay": o["weight_decay"],
        }  # fmt: skip
        return Stage(**{**recipe, **fields})


def stacked(flat: dict, tower: str, layers: int) -> dict:
    """The leaves of a scanned tower: blocks_0, blocks_1, ... as one."""
    first = f"{tower}/blocks_0/"
    names = [path.removeprefix(first) for path in flat if path.startswith(first)]
    rest = {path: leaf for path, leaf in flat.items() if not path.startswith(f"{tower}/blocks_")}
    each = {name: [flat[f"{tower}/blocks_{i}/{name}"] for i in range(layers)] for name in names}
    return rest | {f"{tower}/blocks/{name}": np.stack(leaves) for name, leaves in each.items()}


def part(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch."""
    return jax.tree.map(lambda x: x[jnp.asarray(rows)], batch)
