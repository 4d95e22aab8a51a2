"""Several attentions on the same windows of texts and the same tasks. Knows no command line."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile, zip_longest
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy_run import continuation_logits, greedy
from benchmarks.tasks import TASKS, Task, pass_key, score
from megatron_sps2.config import KVCacheDType
from megatron_sps2.engine.tokenizer import Tokenizer
from megatron_sps2.engine.trial import Trial
from megatron_sps2.engine.trial_prefill import Cost, ExactPrefill, Prefill

Row = dict[str, Any]
MakePrefill = Callable[[int], Prefill]  # by the prompt's tokens


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a text; its end is the continuation."""

    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Followed:
    """One window's continuation after a prefill: [continuation] each."""

    text: str
    nll: Tensor
    rise: Tensor  # of nll over exact attention's
    agrees: Tensor  # with exact attention's next token
    kl: Tensor  # from exact attention's next-token distribution to this one, in nats
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What every setting is measured on; exact attention has run over the windows once it is made."""

    trial: Trial
    tokenizer: Tokenizer
    num_prompt: int
    windows: list[Window]
    tasks: list[Task]
    kv_cache_dtype: KVCacheDType = "auto"  # of what is measured; what it is held against is as the model is
    answer_tokens: int = 0  # of a greedy answer to each window's prompt, beside exact attention's
    # Exact logits of each window's continuation, [continuation, v].
    references: list[Tensor] = field(init=False, default_factory=list)
    start: float = field(init=False, default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        for i, window in enumerate(self.windows):
            self.say("exact: window", i, len(self.windows))
            found = continuation_logits(self.trial, window.ids, self.num_prompt, ExactPrefill())
            self.references.append(found)

    def measure(self, name: str, make: MakePrefill) -> Row:
        """The row of a setting; its name and those of texts are as given."""
        followed = []
        for i, window in enumerate(self.windows):
            self.say(f"{name}: window", i, len(self.windows))
            followed.append(self._follow(window, self.references[i], make(self.num_prompt)))
        row = {"setting": name, **summarise(followed)}
        kinds = dict.fromkeys(window.text for window in self.windows)
        row["texts"] = {kind: summarise([one for one in followed if one.text == kind]) for kind in kinds}
        if self.answer_tokens:
            row["equal_answer"] = mean(self._agreeing(window, make) for window in self.windows)
        return row | self._answer_tasks(name, make)

    def say(self, what: str, index: int, count: int) -> None:
        seconds = time.perf_counter() - self.start
        print(f"{seconds:6.0f} s  {what} {index + 1} of {count}", file=sys.stderr, flush=True)

    def _follow(self, window: Window, reference: Tensor, prefill: Prefill) -> Followed:
        logits = reference
        if not isinstance(prefill, ExactPrefill) or self.kv_cache_dtype != "auto":
            logits = continuation_logits(
                self.trial, window.ids, self.num_prompt, prefill, self.kv_cache_dtype
            )
        ours, exact = logits.log_softmax(-1), reference.log_softmax(-1)
        right = torch.tensor(window.ids[self.num_prompt :])
        nll, exact_nll = (F.nll_loss(scores, right, reduction="none") for scores in (ours, exact))
        return Followed(
            window.text,
            nll=nll,
            rise=nll - exact_nll,
            agrees=(ours.argmax(-1) == exact.argmax(-1)).float(),
            kl=(exact.exp() * (exact - ours)).sum(-1),
            cost=prefill.cost(),
        )

    def _agreeing(self, window: Window, make: MakePrefill) -> float:
        """Share of a greedy answer to the window's prompt before it differs from exact attention's."""
        ids, count = window.ids[: self.num_prompt], self.answer_tokens
        wanted = greedy(self.trial, ids, ExactPrefill(), count)
        found = greedy(self.trial, ids, make(self.num_prompt), count, self.kv_cache_dtype)
        pairs = zip_longest(found, wanted)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / max(1, len(wanted))

    def _answer_tasks(self, name: str, make: MakePrefill) -> Row:
        found: dict[str, list[tuple[Task, float]]] = {}
        for i, task in enumerate(self.tasks):
            self.say(f"{name}: task", i, len(self.tasks))
            prefill = make(len(task.prompt_ids))
            ids = greedy(self.trial, task.prompt_ids, prefill, task.max_tokens, self.kv_cache_dtype)
            found.setdefault(task.kind, []).append((task, score(task, self.tokenizer.decode(ids))))
        needles = found.pop(NEEDLE, [])
        row: Row = {
            "needles_found": sum(share == 1.0 for _, share in needles),
            "needles": len(needles),
            "needle_depths": [[task.depth, share == 1.0] for task, share in needles],
        }
        ruler = {kind: mean(share for _, share in answers) for kind, answers in found.items()}
        return row | ({"ruler": ruler} if ruler else {})


def summarise(followed: list[Followed]) -> Row:
    """Over all tokens of all continuations; costs are means over prompts."""
    rise = torch.cat([one.rise for one in followed])
    masses = [one.cost.kept_mass for one in followed if one.cost.kept_mass is not None]
    return {
        "perplexity": math.exp(torch.cat([one.nll for one in followed]).mean().item()),
        # Beside exact attention on the same tokens, 0.01 is 1% more; and its standard error.
        "perplexity_rise": math.expm1(rise.mean().item()),
        "perplexity_rise_error": rise.std(correction=0).item() / math.sqrt(len(rise)),
        "bytes_ratio_to_pass_kv": mean(one.cost.bytes_ratio for one in followed),
        "kept_mass": mean(masses) if masses else None,
        "density": mean(one.cost.density for one in followed),
        "agreement": torch.cat([one.agrees for one in followed]).mean().item(),
        "kl_first": mean(one.kl[0].item() for one in followed),
        "kl": torch.cat([one.kl for one in followed]).mean().item(),
    }


def cut_windows(text: str, ids: list[int], num_tokens: int, num_samples: int) -> list[Window]:
    """`num_samples` stretches from evenly spread places. Raises ValueError for a text that is too short."""
    room = len(ids) - num_tokens
    if len(ids) < num_samples * num_tokens:
        raise ValueError(
            f"text {text!r} has {len(ids)} tokens, {num_samples} samples of {num_tokens} would overlap; give "
            "a longer text or fewer --samples"
        )
    starts = [room * (2 * i + 1) // (2 * num_samples) for i in range(num_samples)]
    return [Window(text, ids[start : start + num_tokens]) for start in starts]


NEEDLE = "pass_key"


def make_tasks(
    tokenizer: Tokenizer, fillers: list[str], num_tokens: int, num_needles: int, num_each: int
) -> Iterator[Task]:
    """Needles at evenly spread depths and `num_each` tasks of each other kind; texts take turns."""
    for i in range(num_needles):
        filler, depth = fillers[i % len(fillers)], (i + 0.5) / num_needles
        yield pass_key(tokenizer, filler, num_tokens, i, depth)
    for kind in (kind for kind in TASKS if kind != NEEDLE):
        for i in range(num_each):
            yield TASKS[kind](tokenizer, fillers[i % len(fillers)], num_tokens, i)
