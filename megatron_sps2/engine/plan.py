"""What one engine step does, as plain data: made by the scheduler on rank 0, broadcast, run by every rank.

Knows no torch and no group.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.config import SamplingParams

Blocks = tuple[tuple[int, ...], ...]  # of each sp rank


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPrompt:
    """What ranks must know of a request before its first layer.

    `num_past` tokens of the request are cached from an earlier turn; `token_ids` follow them. The last
    `num_generated` of these are an answer begun before the request was preempted. `prefix` are full blocks,
    filled by other requests, that hold the beginning of `token_ids`.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams
    num_past: int = 0
    num_generated: int = 0
    prefix: Blocks = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPiece:
    """Layers first_layer <= i < last_layer of tokens start <= position < stop of a request.

    `prompt` comes with a request's first piece, `blocks` with the first layer of each chunk of its tokens.
    """

    request_id: int
    start: int
    stop: int
    first_layer: int
    last_layer: int
    strategy: str
    home: int | None = None  # the sp rank of a request that lives on one
    turn: int = 0  # by how many ranks the layout of its tokens is turned
    blocks: Blocks = ()
    prompt: NewPrompt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeToken:
    """One request's newest token: computed on sp rank `home`, its K and V kept on sp rank `kv_rank`."""

    request_id: int
    token_id: int
    position: int
    home: int
    kv_rank: int
    new_block: int | None  # granted on kv_rank where its last block is full
    spread: bool = True  # False: all its KV is on `home`, and its queries do not travel


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Pieces of prefills and a batch of decodes, run in one pass over the layers; all of them where both.

    Before the pass ranks forget `freed` requests, then copy `swapped_out` ones to host memory and bring
    `swapped_in` ones back, into these blocks.
    """

    pieces: tuple[PrefillPiece, ...] = ()
    decode: tuple[DecodeToken, ...] = ()  # sorted by home, those that are not spread first
    freed: tuple[int, ...] = ()
    swapped_out: tuple[int, ...] = ()
    swapped_in: tuple[tuple[int, Blocks], ...] = ()
    audit: bool = False  # every rank tells how many blocks its tables hold
    stop: bool = False  # the last plan

    def __post_init__(self) -> None:
        layers = {(piece.first_layer, piece.last_layer) for piece in self.pieces}
        assert len(layers) <= 1, f"pieces of one step run the same layers, not {layers}"

    @property
    def is_empty(self) -> bool:
        """True where no layer runs."""
        return not (self.pieces or self.decode)

    @property
    def kind(self) -> str:
        """prefill, decode, mixed or idle."""
        if self.pieces:
            return "mixed" if self.decode else "prefill"
        return "decode" if self.decode else "idle"
