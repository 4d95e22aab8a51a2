"""Token ids of one answer to text, as they come: whole characters only, ending before a stop string.

Decodes a short window of the newest tokens, so a token costs the same at any length. Knows no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not a character (yet)
# A character has at most 4 bytes and a token at least one: a longer run of unfinished tokens is garbage,
# of which the last GARBAGE_ANCHOR tokens are context enough.
MAX_WINDOW = 32
GARBAGE_ANCHOR = 8


class Decoder(Protocol):
    """What Detokenizer needs of a tokenizer."""

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Streams one answer: joined, push and flush give decode(all ids), cut before the first stop string.

    Stop strings are looked for in the text after the first `min_tokens` tokens. Bytes that never become a
    character come out as replacement characters; a byte-fallback tokenizer may give fewer than decode does.
    """

    def __init__(self, tokenizer: Decoder, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._num_unstoppable = min_tokens
        # Tokens that are decoded together. The first _num_anchor are shown already and stay as context: a
        # token's text may depend on the one before it (a leading space, bytes of one character).
        self._window: list[int] = []
        self._num_anchor = 0
        self._num_shown = 0  # characters of the window's text that are given out or held
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped_by: str | None = None

    @property
    def finished(self) -> bool:
        """True once a stop string was met; later tokens are ignored."""
        return self.stopped_by is not None

    def push(self, token_id: int) -> str:
        """One more token -> the text that is safe to show now, often empty."""
        if self.finished:
            return ""
        may_stop = self._num_unstoppable == 0
        self._num_unstoppable -= not may_stop
        return self._filter_stop(self._decode_token(token_id), may_stop)

    def flush(self) -> str:
        """End of the answer -> whatever was held back. Nothing may be pushed afterwards."""
        if self.finished:
            return ""
        text = self._filter_stop(self._tokenizer.decode(self._window)[self._num_shown :], True) + self._held
        self._window, self._num_anchor, self._num_shown, self._held = [], 0, 0, ""
        return text

    def _decode_token(self, token_id: int) -> str:
        """The characters that are certain now and were not before."""
        if token_id in self._tokenizer.special_token_ids:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        certain = len(text.rstrip(REPLACEMENT))
        if certain < len(text) and len(self._window) >= MAX_WINDOW:
            certain = len(text) - 1  # of a long run of garbage only the end can still become a character
        new = text[self._num_shown : certain]
        self._num_shown = max(self._num_shown, certain)
        self._slide(len(text) - certain)
        return new

    def _slide(self, num_open: int) -> None:
        """Forgets what later tokens cannot change; the text's last `num_open` characters are uncertain."""
        if num_open and len(self._window) < MAX_WINDOW:
            return
        anchor = self._window[-GARBAGE_ANCHOR:] if num_open else self._window[self._num_anchor :]
        anchor_text = self._tokenizer.decode(anchor)
        # Without text (a space stripped at the start) it is no context for the next token: keep more.
        if anchor_text or len(self._window) >= MAX_WINDOW:
            self._window = anchor
            self._num_shown = len(anchor_text) - num_open
        self._num_anchor = len(self._window)

    def _filter_stop(self, new: str, may_stop: bool) -> str:
        """Adds `new` to the held text and gives out what no stop string can claim."""
        if not may_stop:
            return new
        text = self._held + new
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            # The one that is complete first: the same answer however the text is cut into tokens.
            _, start, self.stopped_by = min(found)
            self._held = ""
            return text[:start]
        num_safe = len(text) - self._num_held(text)
        self._held = text[num_safe:]
        return text[:num_safe]

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
