"""A text that grows token by token: what of it can be sent, and whether a stop string has ended it."""

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what a tokenizer writes for a character of which some bytes are still to come


class TextStream:
    """Turns a growing list of tokens into pieces of text.

    The pieces together are the whole text: `sampler.texts` of the tokens, cut before the first stop string. A piece
    that may turn out otherwise is held back: half a character, white space at the end (a text has none there), the
    beginning of a stop string.

    Args:
      tokenizer: the LM's.
      stops: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self.text = ""  # what was sent
        self.stopped = False

    def feed(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Returns the next piece, "" for none.

        Args:
          tokens: all of the text so far, without an end token.
          last: no more will come.
        """
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        whole = whole.strip() if last else whole.strip().rstrip(_HALF).rstrip()
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self.stopped = True
            whole = whole[: min(found)].rstrip()
        elif not last:
            whole = whole[: len(whole) - self._begun(whole)].rstrip()
        if not whole.startswith(self.text):  # rewritten by a later token: nothing can be taken back
            return ""
        piece, self.text = whole[len(self.text) :], whole
        return piece

    def _begun(self, text: str) -> int:
        """The length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
