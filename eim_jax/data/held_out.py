"""A share of one's own data that is not trained on but scored on, drawn by a seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eim_jax.config import ConfigError


def check_share(share: float) -> None:
    """Raises ConfigError for a `config.data.eval_share` that is no part."""
    if not 0 <= share < 1:
        raise ConfigError(f"config.data.eval_share is {share:g}: a share of the rows is 0 or more and below 1")


@dataclass(frozen=True)
class HeldOut:
    """One side of a share that is held out.

    Whole pictures are drawn, so that no picture is on both sides. Each is drawn by its own name and the seed: rows that
    are added later move no other, and a larger share holds all of a smaller one.

    Attributes:
      share: of the pictures, and of the rows without one; above 0 and below 1.
      seed: of the draw.
      taken: whether this side is what was held out; else what is left to train on.
    """

    share: float
    seed: int
    taken: bool

    def draws(self, name: str) -> bool:
        """Returns whether a picture, or a row without one, is held out.

        >>> side = HeldOut(0.25, seed=0, taken=True)
        >>> sum(side.draws(str(number)) for number in range(1000))
        250
        """
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64

    def kept(self, items: Sequence[Any], names: Sequence[str], where: str) -> list[Any]:
        """Returns the items of this side, in order.

        Args:
          items: any.
          names: of each one's picture, or its own.
          where: what they are, for the message.

        Raises:
          ValueError: one of the two sides is empty.
        """
        found = [item for item, name in zip(items, names, strict=True) if self.draws(name) == self.taken]
        if not 0 < len(found) < len(items):
            raise ValueError(
                f"{where}: config.data.eval_share={self.share:g} with eval_seed={self.seed} leaves nothing on one side "
                f"of {len(set(names))} pictures and rows without one: choose another share, or another seed"
            )
        return found
