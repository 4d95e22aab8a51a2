"""First come, first served, with decodes between the layers of a prefill. Pure Python; emits StepPlans.

One prompt is prefilled at a time, in pieces of a few layers; between two pieces the running requests decode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sps2.attention.strategy import choose_strategy, csa_strategy, lay_out, wants_csa
from megatron_sps2.config import AttentionConfig, KVCacheFull, ModelConfig, ParallelConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.plan import DecodeToken, NewPrompt, PrefillPiece, StepPlan
from megatron_sps2.engine.request import FinishReason, Request


@dataclass(slots=True)
class _Prefilling:
    request: Request
    next_layer: int = 0


class Scheduler:
    """Waiting, prefilling and running requests -> the next plan."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        attention: AttentionConfig,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        layers_per_piece: int | None = None,
        csa: CsaSetting | None = None,
    ) -> None:
        self._model, self._parallel, self._attention, self._blocks = model, parallel, attention, blocks
        self._csa = csa
        self._max_num_seqs = max_num_seqs
        self._layers_per_piece = layers_per_piece or model.num_layers
        self._waiting: deque[Request] = deque()
        self._prefilling: _Prefilling | None = None
        self._running: list[Request] = []
        self._freed: list[int] = []
        # Per rank: blocks that an admitted request may come to hold, or that a finished one still keeps.
        self._reserved: dict[int, list[int]] = {}
        self._decode_is_next = False
        self.last_strategy = ""

    @property
    def has_work(self) -> bool:
        """True while a plan would do something, freeing blocks included."""
        return bool(self._waiting or self._prefilling or self._running or self._freed)

    def add(self, request: Request) -> None:
        """Raises ValueError for a request that fits not even an empty cache, or not the chosen strategy."""
        if request.attention != "exact" and self._csa is None:
            raise ValueError(
                f"attention={request.attention!r} on an engine without CSA; build it with a setting "
                "(EngineConfig.csa, --attention auto)"
            )
        needed, cache = max(self._blocks_of(request)), self._blocks.config
        if needed > cache.num_blocks:
            raise ValueError(
                f"the request may grow to {needed} KV blocks of {cache.block_size} tokens on an sp rank, and "
                f"each has {cache.num_blocks}; raise --max-model-len or --sp, or lower --max-tokens"
            )
        self._waiting.append(request)

    def abort(self, request_id: int) -> None:
        """Ends a request wherever it is; its blocks go with the next plan."""
        for request in [
            *self._waiting,
            *self._running,
            *([self._prefilling.request] if self._prefilling else []),
        ]:
            if request.request_id == request_id:
                request.finish_reason = FinishReason.ABORT
                self.release(request)

    def schedule(self) -> StepPlan:
        """The next step: a piece of a prefill or a decode batch, in turns while there are both.

        Raises KVCacheFull, and changes nothing, when nothing runs and the next prompt has no room beside the
        caches kept of finished requests: only releasing one of them helps.
        """
        self._admit()
        freed, self._freed = tuple(self._freed), []
        if self._prefilling and not (self._running and self._decode_is_next):
            self._decode_is_next = True
            return StepPlan(prefill=self._next_piece(self._prefilling), freed=freed)
        self._decode_is_next = False
        return StepPlan(decode=self._decode_batch(), freed=freed)

    def prefilled(self, request: Request) -> None:
        """The prompt's last piece has run and its first token was taken."""
        self._prefilling = None
        if request.finish_reason is None:
            self._running.append(request)
        else:
            self.release(request, keep_cache=True)

    def release(self, request: Request, keep_cache: bool = False) -> None:
        """Forgets a finished request; its blocks go back unless the cache is kept, e.g. for another turn."""
        if self._prefilling and self._prefilling.request is request:
            self._prefilling = None
        self._running = [other for other in self._running if other is not request]
        self._waiting = deque(other for other in self._waiting if other is not request)
        if keep_cache:
            self._reserved[request.request_id] = self._blocks.blocks_per_rank(request.request_id)
        else:
            self._reserved.pop(request.request_id, None)
            self._blocks.free(request.request_id)
            self._freed.append(request.request_id)

    def _strategy_of(self, request: Request) -> str:
        num_new = len(request.prompt_ids)
        if self._csa and wants_csa(request.attention, self._attention, self._csa, num_new, request.num_past):
            return csa_strategy(self._csa)
        return self.exact_strategy(request)

    def exact_strategy(self, request: Request) -> str:
        """The strategy that serves the prompt where it runs exactly."""
        return choose_strategy(
            self._attention.strategy,
            num_heads=self._model.num_attention_heads // self._parallel.tp_size,
            num_kv_heads=self._model.num_query_groups // self._parallel.tp_size,
            sp_size=self._parallel.sp_size,
            num_past=request.num_past,
        )

    def _tokens_per_rank(self, request: Request) -> list[int]:
        """Of its prompt, the part that is not cached yet."""
        strategy, num_new = self._strategy_of(request), len(request.prompt_ids)
        return lay_out(strategy, num_new, self._parallel.sp_size, self._csa).tokens_per_rank

    def _blocks_of(self, request: Request) -> list[int]:
        """Per rank, at its full length; the last token of an answer is never fed, so it needs no slot."""
        return self._blocks.most_blocks(
            request.request_id, self._tokens_per_rank(request), request.params.max_tokens - 1
        )

    def _admit(self) -> None:
        """Starts the oldest waiting prompt once it has room to grow to its full length: none gets stuck."""
        busy = len(self._running) + (self._prefilling is not None)
        if self._prefilling or not self._waiting or busy >= self._max_num_seqs:
            return
        request = self._waiting[0]
        wanted = self._blocks_of(request)
        others = [blocks for owner, blocks in self._reserved.items() if owner != request.request_id]
        if max(map(sum, zip(wanted, *others, strict=True))) <= self._blocks.config.num_blocks:
            self._waiting.popleft()
            self._reserved[request.request_id] = wanted
            self._prefilling = _Prefilling(request)
        elif not busy:
            raise KVCacheFull(
                f"request {request.request_id} needs {max(wanted)} KV blocks on an sp rank and finished "
                f"requests keep the cache; release one of {sorted(self._reserved)}"
            )

    def _next_piece(self, prefilling: _Prefilling) -> PrefillPiece:
        first = prefilling.next_layer
        last = min(first + self._layers_per_piece, self._model.num_layers)
        prefilling.next_layer = last
        prompt = self._new_prompt(prefilling.request) if first == 0 else None
        return PrefillPiece(
            request_id=prefilling.request.request_id, first_layer=first, last_layer=last, prompt=prompt
        )

    def _new_prompt(self, request: Request) -> NewPrompt:
        self.last_strategy = self._strategy_of(request)
        return NewPrompt(
            token_ids=request.prompt_ids,
            num_past=request.num_past,
            strategy=self.last_strategy,
            blocks=self._blocks.allocate(request.request_id, self._tokens_per_rank(request)),
            params=request.params,
        )

    def _decode_batch(self) -> tuple[DecodeToken, ...]:
        kept = [self._blocks.append(request.request_id) for request in self._running]
        homes = assign_homes([rank for rank, _ in kept], self._parallel.sp_size)
        tokens = [
            DecodeToken(
                request_id=request.request_id,
                token_id=request.output[-1].token_id,
                position=request.num_tokens - 1,
                home=home,
                kv_rank=kv_rank,
                new_block=block,
            )
            for request, home, (kv_rank, block) in zip(self._running, homes, kept, strict=True)
        ]
        return tuple(sorted(tokens, key=lambda token: token.home))


def assign_homes(kv_ranks: Sequence[int], num_ranks: int) -> list[int]:
    """A home for each token of a batch: where its KV is kept, while no rank computes more than its share.

    A token at home where its KV is kept sends no K and V anywhere.
    """
    share = -(-len(kv_ranks) // num_ranks)
    room = [share] * num_ranks
    homes: list[int | None] = []
    for rank in kv_ranks:
        homes.append(rank if room[rank] else None)
        room[rank] -= bool(room[rank])
    for i, home in enumerate(homes):
        if home is None:
            homes[i] = max(range(num_ranks), key=lambda rank: room[rank])
            room[homes[i]] -= 1  # type: ignore[index]
    return [home for home in homes if home is not None]
