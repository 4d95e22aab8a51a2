"""What the front end and the ranks say to each other: msgpack messages over ZeroMQ. Knows no HTTP, no torch.

The front end binds both sockets before any rank starts. Each replica's first rank (its leader) connects a
DEALER to `Endpoints.engine`, where requests go out and answers come in; every rank connects a PUSH to
`Endpoints.beats`, where it says that it lives. Whoever watches the ranks may push a `Lost` there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from megatron_sps2.config import AttentionMode, SamplingParams

# A rank says that it lives this often.
BEAT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """ZeroMQ addresses that the front end binds."""

    engine: str  # ROUTER; a replica's leader has the identity that `identity` gives
    beats: str  # PULL


def identity(world: int, replica: int) -> bytes:
    """Of a leader's socket. Each world of ranks has a random number: what an earlier one says is ignored."""
    return f"{world}:{replica}".encode()


# Front end -> leader of a replica.


class Submit(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A new request. `request_id` is unique, over front ends too; an HTTP request may make several."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    attention: AttentionMode | None = None  # None: the engine's default


class Abort(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Ends a request wherever it is; its blocks are freed on every rank. An unknown one is fine.

    No Delta comes for it after the one that may be on its way. Also sent when a stop string was met.
    """

    request_id: str


class Stop(msgspec.Struct, tag=True, frozen=True):
    """The last message: the ranks of the replica leave their loop and exit with code 0."""


ToEngine = Submit | Abort | Stop


# Leader of a replica -> front end.


class Ready(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Weights are loaded and requests are served. The first message, and again now and then."""

    world: int
    replica: int
    ranks: list[int]  # world ranks of the replica
    num_layers: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int  # KV blocks of each sp rank
    block_size: int
    eos_token_ids: list[int]
    policy: str


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token; log-probabilities where the request asked for them."""

    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = []


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Of one request in the engine, in milliseconds; comes with its last Delta."""

    queue_ms: float  # from arrival to its first layer
    prefill_ms: float  # from its first layer to its first token, pauses included
    ttft_ms: float
    e2e_ms: float
    tbt_mean_ms: float | None  # None where there is one token only
    tbt_p99_ms: float | None
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    num_preemptions: int
    num_pauses: int  # times its prefill paused between two layers for something else
    sp_size: int  # ranks that held it


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """News of one request: tokens that are new, in order, and how it ended if it did.

    finish_reason: stop, length, abort, or error (with `error` saying why; the tokens before it stand).
    """

    request_id: str
    tokens: list[Token] = []
    # With the first tokens, where prompt_logprobs was asked for: one entry a prompt token, None first.
    prompt_logprobs: list[Token | None] | None = None
    finish_reason: str | None = None
    error: str | None = None
    timings: Timings | None = None
    csa: dict[str, Any] | None = None  # what CSA kept and sent, with the first tokens


class Deltas(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The news of one engine step."""

    items: list[Delta]


class Refused(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A Submit that cannot be served: the user's mistake; nothing was queued."""

    request_id: str
    message: str


class EngineStats(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """State of a replica's engine, several times a second; counters count from its start."""

    replica: int
    num_waiting: int
    num_prefilling: int
    num_running: int
    num_swapped: int
    num_paused: int  # prefills that have begun and are not running now
    num_free_blocks: list[int]  # per sp rank
    num_cached_blocks: list[int]  # per sp rank: free blocks that hold a reusable prefix (counted as free too)
    num_steps: int
    num_preemptions: int
    num_pauses: int
    prefix_queries: int  # prompt tokens looked up
    prefix_hits: int  # prompt tokens found
    # Per sp rank: blocks that rank's cache holds for requests the scheduler does not know; None before the
    # first audit. 0 everywhere unless something leaked.
    num_leaked_blocks: list[int] | None


FromEngine = Ready | Deltas | Refused | EngineStats


# Any rank, or who watches it -> front end, on `Endpoints.beats`.


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a rank did in one engine step, for the timeline."""

    kind: str  # prefill, decode, mixed, idle
    start: float  # time.time(), seconds
    seconds: float
    first_layer: int
    last_layer: int
    num_prompt_tokens: int  # that this rank computed in the step
    num_decodes: int  # decode tokens at home on this rank
    requests: list[int]  # engine's numbers of the requests in the step


class Beat(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A rank lives. Sent every BEAT_S seconds by a thread of its own, also in the middle of a long step."""

    world: int
    rank: int  # in the world
    replica: int
    sp_rank: int
    tp_rank: int
    host: str
    pid: int
    time: float  # time.time()
    num_used_blocks: int  # KV blocks that this rank's tables hold
    bytes_sent: dict[str, int]  # by collective, since start
    rss_bytes: int
    peak_bytes: int  # the most that rss_bytes has been
    steps: list[StepRecord]  # finished since the last beat


class Lost(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The world is broken: one line that names who and how. All requests end with an error."""

    message: str
    world: int | None = None  # None: the present one


BeatMessage = Beat | Lost

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_beat = msgspec.msgpack.Decoder(BeatMessage).decode
