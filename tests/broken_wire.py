"""The control of every distributed test: collectives that move nothing.

With the exchange skipped a test of what ranks compute together must fail; if it passes, it guards nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from megatron_sps2.parallel.mailbox import Mailbox


class _Nothing:
    def wait(self) -> None: ...


def _keep_to_oneself(output: Tensor, *_: Any, **__: Any) -> _Nothing:
    output.zero_()
    return _Nothing()


def _lose_mail(_: Mailbox, send: Tensor, numels: Any, received: Tensor, recv_numels: Any) -> _Nothing:
    return _keep_to_oneself(received)


@contextmanager
def exchange_skipped(skipped: bool = True) -> Iterator[None]:
    """Inside the block every all-to-all delivers zeros (when `skipped`)."""
    if not skipped:
        yield
        return
    with (
        mock.patch.object(dist, "all_to_all_single", _keep_to_oneself),
        mock.patch.object(Mailbox, "exchange", _lose_mail),
    ):
        yield
