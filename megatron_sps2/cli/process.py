"""What every process of a command needs: its log lines, its exit code, one line for an error.

Knows the launcher's variables, not what the command does.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from megatron_sps2.parallel.rank_env import launched_rank
from megatron_sps2.parallel.shared_error import is_shared, was_told

USER_ERROR, RUN_ERROR, INTERRUPTED = 2, 1, 130
LOG_FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
# Python warnings of these kinds come from libraries and speak to their programmers; we log, and never warn.
LIBRARY_WARNINGS = (UserWarning, FutureWarning, DeprecationWarning)


def set_logging(level: str) -> None:
    """Log lines on stderr, labelled by rank; libraries' Python warnings at --log-level debug only."""
    rank, _ = launched_rank() or (0, 1)
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT.format(rank=rank), force=True)
    if level == "debug" or sys.warnoptions:  # the user has chosen, by -W or PYTHONWARNINGS
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for kind in LIBRARY_WARNINGS:
        warnings.simplefilter("ignore", kind)
    # For the processes we start: ranks, and the writers of a checkpoint.
    os.environ["PYTHONWARNINGS"] = ",".join(f"ignore::{kind.__name__}" for kind in LIBRARY_WARNINGS)


def report(error: Exception) -> int:
    """One line on stderr, with the traceback at --log-level debug; the exit code.

    In a world that is up only an error that is marked shared by all ranks is the user's, and rank 0 alone
    prints it. Any other may have come on this rank only: it is printed here, and is a run that failed.
    """
    logging.getLogger(__name__).debug("failed", exc_info=error)
    place, shared = launched_rank(), is_shared(error)
    is_users = _is_users(error) and (shared or not _world_is_up())
    if not was_told(error) and (place is None or place[0] == 0 or not shared):
        text = str(error) or type(error).__name__
        if not isinstance(error, (ValueError, OSError, RuntimeError)):
            text = f"{type(error).__name__}: {text}"
        label = "[rank {} of {}] ".format(*place) if place and not shared else ""
        # One write, so that lines of two ranks never mix.
        sys.stderr.write(f"sps2: error: {label}{text}\n")
        sys.stderr.flush()
    return USER_ERROR if is_users else RUN_ERROR


def leave(code: int) -> int:
    """`code`, for a process that has no part in a world; from within one the process ends here.

    A failed run leaves threads behind that wait for other ranks: the interpreter's own end would wait for
    them, or abort because of them.
    """
    if _world_is_up():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_users(error: Exception) -> bool:
    """A connection or a time-out that fails is the world's doing, though Python calls it an OSError."""
    return isinstance(error, (ValueError, OSError)) and not isinstance(error, (ConnectionError, TimeoutError))


def _world_is_up() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and bool(dist.is_initialized())
