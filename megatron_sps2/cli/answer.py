"""Runs an engine until one answer is complete, showing its prompt's progress and its text as they come."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from megatron_sps2.engine.detokenizer import Detokenizer
from megatron_sps2.engine.engine import Engine
from megatron_sps2.engine.request import FinishReason, Request
from megatron_sps2.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class NoAnswerError(RuntimeError):
    """The model's logits could not be sampled. No rank is inside a step: the engine can be stopped."""


def stream_answer(engine: Engine, request: Request, tokenizer: Tokenizer | None, *, show: bool) -> str:
    """Steps until `request` is finished -> its text, cut before a stop string; '' without a tokenizer.

    `show`: the text goes to stdout as it comes and a progress bar to stderr. Raises NoAnswerError when the
    model's logits could not be sampled.
    """
    detokenizer = (
        Detokenizer(tokenizer, request.params.stop, request.params.min_tokens) if tokenizer else None
    )
    text, bar = "", PrefillBar(show)
    logger.info("prompt of %d tokens, %d of them cached", request.num_prompt_tokens, request.num_past)
    with bar:
        while request.finish_reason is None:
            for news in engine.step():
                if not news.has_token:
                    logger.info("prefill: layer %d of %d", news.layers_done, news.num_layers)
                    bar.update(request, news.layers_done, news.num_layers)
                    continue
                bar.finish()
                new = _push(detokenizer, news.request)
                text += new
                if show:
                    print(new, end="", flush=True)
                if detokenizer and detokenizer.finished:
                    engine.finish(request)
    if request.finish_reason is FinishReason.ERROR:
        raise NoAnswerError(
            f"the model's logits after {len(request.output)} tokens are not numbers; check the checkpoint "
            "and --dtype"
        )
    rest = detokenizer.flush() if detokenizer else ""
    if detokenizer and detokenizer.finished:
        request.finish_reason = FinishReason.STOP  # even where the stop string came with the last token
    if show:
        print(rest, flush=True)
    return text + rest


def _push(detokenizer: Detokenizer | None, request: Request) -> str:
    return detokenizer.push(request.output[-1].token_id) if detokenizer else ""


class PrefillBar(AbstractContextManager["PrefillBar"]):
    """Layers of a prompt's prefill on stderr; silent when `show` is false or stderr is no terminal."""

    def __init__(self, show: bool) -> None:
        self._progress = Progress(
            TextColumn("[dim]reading {task.fields[tokens]:,} tokens"),
            BarColumn(),
            TextColumn("layer {task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            disable=not show or not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None

    def update(self, request: Request, layers_done: int, num_layers: int) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=num_layers, tokens=len(request.prompt_ids))
        self._progress.update(self._task, completed=layers_done)

    def finish(self) -> None:
        self._progress.stop()

    def __exit__(self, *_: object) -> None:
        self.finish()
