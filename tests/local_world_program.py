"""A small program for test_local_world.py: two ranks that do what the first argument says."""

import os
import signal
import sys
import time
from datetime import timedelta

from megatron_sps2.parallel.local_world import run_local_world
from megatron_sps2.parallel.rank_env import RankEnv, init_process_group

# Far beyond what the tests allow: an end that comes by this timeout is a failure.
TIMEOUT = timedelta(seconds=300)


def main(case: str) -> int:
    env = RankEnv.detect()
    assert env is not None and env.launcher == "local"
    return int(CASES[case](env) or 0)


def say(*words: object) -> None:
    """One write for one line, so that lines of two ranks never mix."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def sum_ranks(env: RankEnv, exchange: bool = True) -> None:
    import torch
    import torch.distributed as dist

    init_process_group(env, "gloo", TIMEOUT)
    value = torch.tensor(env.rank + 1)
    if exchange:
        dist.all_reduce(value)
    say("rank", env.rank, "of", env.world_size, "sum", int(value))
    dist.barrier()
    dist.destroy_process_group()


def read(env: RankEnv) -> None:
    say("rank", env.rank, "read", repr(sys.stdin.readline().strip()))


def threads(env: RankEnv) -> None:
    import torch

    chosen = os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), os.environ["GLOO_SOCKET_IFNAME"]
    say("rank", env.rank, "threads", *chosen)


def fail(env: RankEnv) -> None:
    if env.rank == 1:
        raise ValueError("rank 1 cannot go on")
    time.sleep(300)


def exit_7(env: RankEnv) -> int:
    return 7 if env.rank == 0 else 0


def die(env: RankEnv) -> None:
    """Rank 1 dies while rank 0 waits for it in a collective."""
    import torch
    import torch.distributed as dist

    init_process_group(env, "gloo", TIMEOUT)
    dist.barrier()
    if env.rank == 1:
        time.sleep(0.5)
        say("died at", time.monotonic())
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(4))


def stubborn(env: RankEnv) -> None:
    """Rank 0 does not end when asked; rank 1 fails once rank 0 is deaf."""
    if env.rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say("pid", os.getpid())
        time.sleep(300)
    time.sleep(1)
    raise RuntimeError("rank 1 fails")


def wait(env: RankEnv) -> None:
    say("pid", os.getpid())
    time.sleep(300)


CASES = {
    "sum": sum_ranks,
    "no-sum": lambda env: sum_ranks(env, exchange=False),
    "read": read,
    "threads": threads,
    "raise": fail,
    "exit-7": exit_7,
    "kill": die,
    "stubborn": stubborn,
    "wait": wait,
}

if __name__ == "__main__":
    sys.exit(run_local_world(2, main, (sys.argv[1],), preload=("torch.distributed",), grace_s=1.0))
