"""What a loss, and the queue that it contrasts with, say of themselves: the kinds' records.

A loss is one object in one file, entered in `table.LOSSES`. Training, plan, log, inspection, report and experiments ask
the object. See docs/extend/losses.md for a complete example.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from eim_jax.config import Config, Losses
from eim_jax.losses.contrastive import Similarity
from eim_jax.losses.negatives import BatchRows, Negatives, negatives_of
from eim_jax.losses.online_softmax import Positives
from eim_jax.losses.queues import Queue
from eim_jax.models.batch import Batch
from eim_jax.models.vlm import VLM

DIAGNOSTICS = ("recall1", "rank", "similarity", "effective")  # fields of NCE, means of which are logged


@dataclass(frozen=True)
class KeySource:
    """What of a training sample its key is made from.

    Args:
      tower: whose weights decide the keys, as a queue on disk names them: "clip", "text" (the text tower where it has
        a folder of its own, else "clip") or "lm".
      fields: (a run's inputs) -> arrays [N ...] in a dict or tuple, which `QueueKind.encode` reads in batches.
      row: (a run's inputs) -> one row of the same as `jax.ShapeDtypeStruct`, at its longest; reads no data.
      described: (a run's inputs) -> the words by which a queue on disk says what was read: tokeniser and longest text.
      lengths: (a run's inputs, its fields [N t ...]) -> how many of each row's t slots decide its key, [N]: texts are
        then encoded by length, see `Queue.build`. None: rows are encoded whole.
      size: (a run's inputs) -> slots x width of the tower at the longest row; decides how many rows are encoded at a
        time. None: 256.
    """

    tower: str
    fields: Callable[[Any], Any]
    row: Callable[[Any], Any]
    described: Callable[[Any], str]
    lengths: Callable[[Any, Any], Any] | None = None
    size: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class QueueKind:
    """A queue: a fixed key for each training sample. Losses that name the same kind share one queue.

    Args:
      name: its folder's name in the work directory, and the manifest's kind.
      symbol: as the paper or a chart writes it, "K_t".
      source: what of a sample is read.
      encode: (the untouched towers, their parameters, fields) -> [b D]; `keys` calls it.
      pooling: how a sample becomes one vector, in words; a queue on disk with other words is refused.
    """

    name: str
    symbol: str
    source: KeySource
    encode: Callable[[VLM, dict, Any], Array]
    pooling: str

    def keys(self, vlm: VLM, params: dict, fields: Any) -> Float[Array, "b D"]:
        """The keys of a batch of samples, not normalised, by the towers as they were before any arm changed them.

        Args:
          vlm: an arm's modules.
          params: the untouched towers' parameters.
          fields: of these samples, as `source` gives them.
        """
        return self.encode(vlm.untouched(), params, fields)


class Forward:
    """What a batch's losses read of the model; each part is computed when first asked for, and once.

    Args:
      vlm: the arm's modules.
      settings: the config's `losses`.
      params: the nested tree of all parameters.
      batch: its fields as the stage's losses need them.
      key: of dropout; None: none.
      mesh: over which batch and queues lie.
      whole: the rows of the update that the batch is a micro-batch of; None: it is the whole.
    """

    def __init__(
        self,
        vlm: VLM,
        settings: Losses,
        params: dict,
        batch: Batch,
        key: Array | None = None,
        mesh: Mesh | None = None,
        whole: BatchRows | None = None,
    ):
        self.vlm, self.settings, self.params, self.batch, self.mesh = vlm, settings, params, batch, mesh
        self.whole = BatchRows.of(batch) if whole is None else whole
        self._key = key

    @functools.cached_property
    def image_tokens(self) -> Float[Array, "b n v"]:
        """CLIP.visual's tokens: of the batch's images, or as they were cached."""
        cached = self.batch.features
        if cached is not None:
            return cached
        batch = self.batch
        return self.vlm.encode_image(self.params, batch.read("image"), self.dropout(2), batch.has_image)

    @functools.cached_property
    def connected(self) -> Float[Array, "b m d"]:
        """The ST's output tokens."""
        return self.vlm.connect(self.params, self.image_tokens)

    def dropout(self, number: int) -> Array | None:
        """A key of its own for one use of dropout (0 to 2 are taken: loss_base, loss_LM, CLIP); None without."""
        return None if self._key is None else jax.random.fold_in(self._key, number)


@runtime_checkable
class Loss(Protocol):
    """What every entry of `table.LOSSES` answers.

    It may have three methods more: `averaged(mean)`, for a sum that is not over rows; `readings(settings)`, for texts
    that it can read packed; and `drawn(vlm, key)`, for parameters of its own, say a head behind the query. They are a
    tree at `params["loss"][name]` (paths "loss/NAME/..."), train where a stage's patterns say so, and are part of
    checkpoints but not of an export. And a `unit`, for charts, where it is not in nats.
    """

    name: str  # in configs and logs: "ie"
    title: str  # in reports: "loss_IE"
    queue: QueueKind | None
    needs_image: bool

    def fields(self, settings: Losses) -> frozenset[str]:
        """The batch fields that it reads besides `index`; "image" may be served as cached "features"."""
        ...

    def normaliser(self, vlm: VLM, batch: Batch) -> Float[Array, ""]:
        """What its sum over a batch is divided by; known before any forward pass."""
        ...

    def value(self, forward: Forward, queue: Queue | None) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Its sum over the batch in nats, and sums to log."""
        ...

    def check(self, config: Config) -> None:
        """Raises ConfigError for settings that it cannot serve."""
        ...


@dataclass(frozen=True)
class ContrastiveLoss:
    """A loss that draws each sample's query to the sample's own key in a queue over the whole training set.

    Args:
      name: in configs (`stages.*.losses.NAME`) and logs (`loss/NAME`).
      title: in reports.
      queue: the keys.
      query: (what the model computed) -> [b D].
      needs: batch fields that `query` reads.
      needs_image: whether a row without an image takes no part; then data of texts alone is refused.
      drawn: (the arm's modules, a key) -> parameters of its own, which `query` finds at `forward.params["loss"][NAME]`.
    """

    name: str
    title: str
    queue: QueueKind
    query: Callable[[Forward], Array]
    needs: frozenset[str]
    needs_image: bool = False
    drawn: Callable[[VLM, Array], dict] | None = None

    def fields(self, settings: Losses) -> frozenset[str]:
        """The batch fields that it reads besides `index`, under these settings."""
        return self.needs | ({"has_image"} if self.needs_image else set()) | self._before(settings)

    def _before(self, settings: Losses) -> set[str]:
        return {"before"} if self.negatives(settings).before else set()

    def negatives(self, settings: Losses) -> Negatives:
        """Which keys it contrasts with besides a query's own."""
        return negatives_of(settings, self.name)

    def positives(self, settings: Losses) -> Positives:
        """Which keys count as a query's own."""
        return cast(Positives, settings.of("positives", self.name))

    def normaliser(self, vlm: VLM, batch: Batch) -> Float[Array, ""]:
        """The rows that take part."""
        rows = batch.read("has_image").sum() if self.needs_image else batch.index.shape[0]
        return jnp.float32(rows)

    def value(self, forward: Forward, queue: Queue | None) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The sum of -log p(own key) over the rows that take part, in nats, and the sums of its diagnostics."""
        settings, batch = forward.settings, forward.batch
        assert queue is not None, f"{self.title} is given its queue {self.queue.name!r}"
        found = queue.nce(
            self.query(forward),
            batch.index,
            tau=settings.tau,
            similarity=cast(Similarity, settings.similarity),
            weights=batch.read("has_image").astype(jnp.float32) if self.needs_image else None,
            positives=self.positives(settings),
            among=self.negatives(settings).rows(forward.whole, queue.count),
            chunk=settings.chunk,
            mesh=forward.mesh,
        )
        return found.loss, {field: getattr(found, field) for field in DIAGNOSTICS}

    def check(self, config: Config) -> None:
        """Takes any settings."""
