"""The towers and the connector as pure functions: encode_image -> connect -> token_logits, and lm_block for text alone.

There is no monolithic model: each stage composes only what its losses need (EIM section 3).
Parameters are one nested tree {"visual", "text", "st", "lm"}, where losses have some of their own with "loss" beside.

What the LM reads (`lm_input`) depends on its family, which says whether texts start with BOS, and on its adapter:

| LM | with an image | text only |
|---|---|---|
| GPT-2 | visual tokens, text | text |
| LLaMA | BOS, visual tokens, text | BOS, text |
| LLaMA with LaVIN's adapters | BOS, "Image: ", visual tokens, text | BOS, "Image: N/A", text |
| LLaMA with LLaMA-Adapter's prompts | BOS, text; the visual tokens are added to the prompts | BOS, text |
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from eim_jax.config import Decode
from eim_jax.models.layers import Block
from eim_jax.models.lm_input import LMInput, before_texts
from eim_jax.models.lora import Tuned, dropout_of, plain
from eim_jax.models.packing import Packing
from eim_jax.models.quant import quantised_shapes
from eim_jax.parallel.sharding import by_row, whole_over_fsdp
from eim_jax.utils.images import normalise


@dataclass(frozen=True)
class VLM:
    """Vision tower -> ST -> LM, with a text tower beside them for the caption queue; holds no parameters.

    Attributes:
      visual: a VisionTower; this and the LM perhaps with low-rank terms (lora.Tuned).
      text: a TextTower; None where the vision tower has none beside it.
      st: the connector, from make_st.
      lm: a DecoderLM.
      features: which visual tokens the ST receives, one of the vision tower's `features`.
      output_layer: apply the tower's output layer before the ST (stock ClipCap does, EIM does not).
      normalize: divide what the ST reads by its L2 norm, token by token (ClipCap's normalize_prefix).
      bos: the token that every text starts with; None where the LM's family has none.
      noisy: towers ("visual", "lm") that run with their dropout where a key is given; a stage leaves out those of which
        it trains nothing.
      with_image, without_image: the adapter's markers (adapters.Markers).
      mesh: over whose data axes the rows of activations lie.
    """

    visual: nn.Module | Tuned
    text: nn.Module | None
    st: nn.Module
    lm: nn.Module | Tuned
    features: str = "full"
    output_layer: bool = False
    normalize: bool = False
    bos: int | None = None
    noisy: tuple[str, ...] = ("visual", "lm")
    with_image: tuple[int, ...] = ()
    without_image: tuple[int, ...] = ()
    mesh: Mesh | None = None

    @property
    def parts(self) -> tuple[tuple[str, Any], ...]:
        """The towers that an arm may add low-rank terms to, by name."""
        return ("visual", self.visual), ("lm", self.lm)

    @property
    def dropout(self) -> float:
        """The highest dropout rate in training, of the `noisy` towers or of adapters and low-rank terms in them."""
        towers = {"visual": self.visual.config, "lm": self.lm.config}
        rates = [getattr(towers[name], "dropout", 0.0) for name in self.noisy]
        rates += [dropout_of(part) for name, part in self.parts if name in self.noisy]
        adapters = [towers[name].adapter for name in self.noisy]
        return max([0.0, *rates, *(a.dropout_rate for a in adapters if a is not None)])

    @property
    def logit_cap(self) -> float:
        """What caps the head's products to logits (`soft_cap`); 0.0 where nothing does."""
        return getattr(self.lm.config, "logit_cap", 0.0)

    def for_stage(self, trained: Iterable[str]) -> "VLM":
        """Returns the same modules for a stage that trains these paths: the other towers run without dropout.

        A frozen tower is a fixed function of its input, as PyTorch's in eval mode (ClipCap's GPT-2 under only_prefix).
        """
        heads = {path.partition("/")[0] for path in trained}
        return replace(self, noisy=tuple(name for name in self.noisy if name in heads))

    def in_generation(self, settings: Decode) -> "VLM":
        """Returns the same modules as they generate text by config.decode; parameters stay as they are."""
        config = self.lm.config
        if config.adapter is None:
            return self
        adapter = config.adapter.in_generation(settings)
        return replace(self, lm=self.lm.clone(config=replace(config, adapter=adapter)))

    def untouched(self) -> "VLM":
        """Returns the pretrained towers without what this arm adds to them, and every visual token of theirs.

        Queues are made with them, so that a key is the same in every arm.
        """
        vision, lm = self.visual.config, self.lm.config
        return replace(
            self,
            visual=plain(self.visual).clone(config=replace(vision, prompts=0, prompt_hidden=0, adapter=None)),
            lm=plain(self.lm) if lm.adapter is None else plain(self.lm).clone(config=replace(lm, adapter=None)),
            features="full",
            output_layer=False,
            normalize=False,
            with_image=(),
            without_image=(),
        )

    def encode_image(
        self,
        params: dict,
        images: UInt8[Array, "b h w 3"],
        dropout: Array | None = None,
        has_image: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b n v"]:
        """Returns the visual tokens that `features` names, before the tower's output layer.

        Args:
          params: the tree; "visual" is read.
          images: resized and cropped to the tower's image size; normalised here.
          dropout: a key for the dropout of adapters in the tower; None outside training.
          has_image: which rows have one. Where images are seen together (`Adapter.mixes_rows`) a row without is seen as
            zeros after normalisation, as in LaVIN; elsewhere nobody sees it.
        """
        config = self.visual.config
        pixels = normalise(images, config.mean, config.std)
        if has_image is not None and config.adapter is not None and config.adapter.mixes_rows:
            pixels = jnp.where(has_image[:, None, None, None], pixels, 0)
        noisy = dropout is not None and "visual" in self.noisy and (config.adapter or dropout_of(self.visual))
        options = {"train": True, "rngs": {"dropout": dropout}} if noisy else {}
        variables = {"params": params["visual"]}
        with nn.intercept_methods(self._on_mesh):
            tokens = _apply(self.visual, variables, pixels, self.features, method="tokens", **options)
        return by_row(tokens, self.mesh)

    def _on_mesh(self, call: Callable, arguments: tuple, options: dict, context: Any) -> Any:
        """Tells modules, which know no mesh, where two things lie; XLA's own choice moves far more.

        Rows stay apart at the entry of a block: else the patch embedding's split by width passes on to all behind it.
        And of a kernel in 4 bits the codes are gathered over "fsdp", not the kernel that is made of them.
        """
        module, mesh = context.module, self.mesh
        if isinstance(module, Block) and context.method_name == "__call__":
            arguments = (by_row(arguments[0], mesh), *arguments[1:])
        if mesh is not None and mesh.shape["fsdp"] > 1 and context.method_name == "packed_product":
            layer = "/".join(("lm", *module.path[-2:]))
            leaves = quantised_shapes(module.features_in, module.features).items()
            places = ((name, whole_over_fsdp(f"{layer}/{name}", leaf.shape, mesh)) for name, leaf in leaves)
            options = {**options, "places": tuple(places)}
        return call(*arguments, **options)

    def pooled(self, params: dict, seen: Float[Array, "b n v"]) -> Float[Array, "b j"]:
        """Returns the image's one vector in the joint space, from `encode_image`'s tokens: loss_IE's query.

        CLIP: [CLS] through the frozen output layer.
        """
        variables = {"params": params["visual"]}
        vector = _apply(self.visual, variables, seen, self.features, method="pooled")
        return _apply(self.visual, variables, vector, method="project")

    def connect(self, params: dict, seen: Float[Array, "b n v"]) -> Float[Array, "b m d"]:
        """Returns the ST's output tokens, in the LM's embedding space, from `encode_image`'s tokens."""
        if self.output_layer:
            seen = _apply(self.visual, {"params": params["visual"]}, seen, method="project")
        if self.normalize:
            exact = seen.astype(jnp.float32)
            seen = (exact / jnp.linalg.norm(exact, axis=-1, keepdims=True)).astype(seen.dtype)
        return by_row(_apply(self.st, {"params": params["st"]}, seen), self.mesh)

    def embed(self, params: dict, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Returns LM_e, the LM's input embeddings."""
        return by_row(_apply(self.lm, {"params": params["lm"]}, tokens, method="embed"), self.mesh)

    def lm_input(
        self,
        params: dict,
        tokens: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        *,
        visual: Float[Array, "b m d"] | None = None,
        has_image: Bool[Array, "b"] | None = None,
        generating: bool = False,
    ) -> LMInput:
        """Returns what the LM reads for these texts (its last t slots) and images; see the module's table.

        Args:
          params: the whole tree.
          tokens: the text, padded on the right.
          valid: which of them are no padding.
          visual: the ST's output; None reads text alone (loss_LM: then markers are left out too).
          has_image: False hides a row's visual tokens; None means that all rows have an image, if `visual` is given.
          generating: new tokens follow: the adapter says at which positions (`generation_positions`).

        Raises:
          ValueError: there is nothing to read: no BOS, no text, and no image whose tokens the LM reads.
        """
        b, adapter = tokens.shape[0], self.lm.config.adapter
        pictured = jnp.broadcast_to(jnp.asarray(visual is not None), (b,)) if has_image is None else has_image
        inserted = visual if adapter is None or adapter.visual_tokens else None
        if inserted is None:
            before = before_texts(self.bos, (), (), 0, pictured)
        else:
            without = () if has_image is None else self.without_image
            before = before_texts(self.bos, self.with_image, without, inserted.shape[1], pictured)
        embeds = self.embed(params, jnp.concatenate([before.ids, tokens], axis=1))
        if inserted is not None:
            embeds = before.embeds(embeds, inserted, pictured)
        valid = jnp.concatenate([before.valid, valid], axis=1)
        if not embeds.shape[1]:
            raise ValueError(
                "the language model has nothing to read: its texts start without BOS, no prompt is given, and the "
                "adapter takes the image elsewhere: take data with prompts, or an adapter that inserts the image"
            )
        first = 0 if adapter is None else adapter.first_position
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0) + first
        steer = newest = None
        if adapter is not None:
            if generating:
                positions, newest = adapter.generation_positions(positions)
            with nn.intercept_methods(self._on_mesh):
                steer = _apply(self.lm, {"params": params["lm"]}, visual, pictured, method="steer")
        return LMInput(embeds, valid, positions, steer, newest)

    def run_lm(
        self, params: dict, read: LMInput, dropout: Array | None = None, packing: Packing | None = None
    ) -> Float[Array, "b s d"]:
        """Returns LM_block's output for what `lm_input` gave.

        Args:
          params: the whole tree.
          read: each sample in a row of its own.
          dropout: a key, None = deterministic.
          packing: the blocks run over rows that several samples share, which changes nothing but what padding gives:
            zeros.

        Raises:
          ValueError: with `packing`, a row has more slots than the LM's context.
        """
        dropout = dropout if "lm" in self.noisy else None
        if packing is None:
            rows: dict[str, Any] = {"embeds": read.embeds, "valid": read.valid, "positions": read.positions}
        else:
            slots, context = read.embeds.shape[1], self.lm.config.context
            if slots > context:
                raise ValueError(f"{slots} tokens do not fit the language model's context of {context}")
            exchange = packing.exchange(read.valid)
            embeds = by_row(exchange.pack(read.embeds), self.mesh)
            rows = {"embeds": embeds, "positions": exchange.pack(read.positions), "packed": exchange}
        with nn.intercept_methods(self._on_mesh):
            hidden, _ = _apply(
                self.lm,
                {"params": params["lm"]},
                **rows,
                train=dropout is not None,
                method="hidden",
                rngs=None if dropout is None else {"dropout": dropout},
                **({} if read.steer is None else {"steer": read.steer}),
            )
        return by_row(hidden if packing is None else exchange.unpack(hidden), self.mesh)

    def lm_block(
        self,
        params: dict,
        tokens: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        *,
        visual: Float[Array, "b m d"] | None = None,
        has_image: Bool[Array, "b"] | None = None,
        dropout: Array | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "b _ d"]:
        """Returns LM_block's output; the text's are the last t columns, the arguments are those of `lm_input`."""
        found = self.lm_input(params, tokens, valid, visual=visual, has_image=has_image)
        return self.run_lm(params, found, dropout, packing)

    def token_logits(
        self,
        params: dict,
        visual: Float[Array, "b m d"],
        tokens: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        *,
        has_image: Bool[Array, "b"] | None = None,
        dropout: Array | None = None,
    ) -> Float[Array, "b t V"]:
        """Returns float32 logits of which [:, i] predicts tokens[:, i], given the visual tokens and tokens[:, :i].

        Args:
          params: the whole tree.
          visual: the ST's output.
          tokens: the text, padded on the right.
          valid: which of them are no padding.
          has_image: False hides a row's visual tokens; None means that all rows have an image.
          dropout: a key; None outside training.
        """
        return self.logits(params, self.lm_hidden(params, visual, tokens, valid, has_image=has_image, dropout=dropout))

    def lm_hidden(
        self,
        params: dict,
        visual: Float[Array, "b m d"],
        tokens: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        *,
        has_image: Bool[Array, "b"] | None = None,
        dropout: Array | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "b t d"]:
        """Returns LM_block's output from which the head predicts: [:, i] has read the visual tokens and tokens[:, :i].

        Where `starts` says that a row reads nothing before its text, [:, 0] of that row predicts nothing. The arguments
        are those of `token_logits`, and `run_lm`'s packing.
        """
        found = self.lm_input(params, tokens, valid, visual=visual, has_image=has_image)
        hidden = self.run_lm(params, found, dropout, packing)
        before = hidden.shape[1] - tokens.shape[1]
        if not before:  # no BOS, and the image enters elsewhere: nothing predicts the first token
            return jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
        # What stands before the text's first token: in a row without image not the last slot, but the last valid one.
        last = before - 1 - jnp.argmax(found.valid[:, :before][:, ::-1], axis=1)
        first = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return jnp.concatenate([first, hidden[:, before:-1]], axis=1)

    def starts(self, has_image: Bool[Array, "b"]) -> Bool[Array, "b"]:
        """Returns which rows read something before their text's first token: BOS, or an image's tokens."""
        if self.bos is not None:
            return jnp.ones_like(has_image)
        adapter = self.lm.config.adapter
        return has_image if adapter is None or adapter.visual_tokens else jnp.zeros_like(has_image)

    def head_weights(self, params: dict) -> tuple[Float[Array, "_ _"], int]:
        """Returns the weights that turn `lm_hidden` into logits (before `logit_cap`), and their axis of words."""
        return _apply(self.lm, {"params": params["lm"]}, method="head_weights")

    def logits(self, params: dict, hidden: Float[Array, "b t d"]) -> Float[Array, "b t V"]:
        """Returns next-token logits in float32."""
        return _apply(self.lm, {"params": params["lm"]}, hidden, method="logits")

    def caption_feature(self, params: dict, tokens: Int[Array, "b s"]) -> Float[Array, "b j"]:
        """Returns the text tower's features of captions, in its own tokenizer's ids: rows of K_t."""
        assert self.text is not None, "an arm whose loss reads captions is checked to have a text tower"
        return _apply(self.text, {"params": params["text"]}, tokens, method="encode")


def _apply(module: nn.Module | Tuned, *arguments: Any, **options: Any) -> Any:
    """What a module's method returns, without collections that it may have changed: there are none."""
    return module.apply(*arguments, **options)
