"""How much of CSA's communication its pipeline hides: ranks with and without it, taking turns in one run.

Unpipelined, a rank waits for all of it; what pipelined ranks still wait for is the exposed share.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import replace

from benchmarks.csa_speed import add_model, checkpoint_folder, engine_config, token_ids
from benchmarks.side_by_side import Ours

COLUMNS = ("dtype", "tokens", "prefill unpipelined, s", "pipelined, s", "ratio", "waiting unpipelined, s")
MORE = ("waiting pipelined, s", "exposed share", "same token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks
    print("|", " | ".join((*COLUMNS, *MORE)), "|")
    print("|" + "---|" * len((*COLUMNS, *MORE)))
    with checkpoint_folder(args) as folder:
        for dtype in args.dtypes:
            config = engine_config(args, folder, dtype)
            plain = replace(config, attention=replace(config.attention, pipeline=False))
            both = Ours(plain), Ours(config)
            for length in args.lengths:
                cells = _measure(both, token_ids(args, folder, length), args.rounds)
                print("|", " | ".join((dtype, str(length), *cells)), "|", flush=True)
            for ours in both:
                ours.close()


def _measure(both: tuple[Ours, Ours], ids: list[int], rounds: int) -> list[str]:
    times, waits, tokens = ([], []), ([], []), ([], [])  # type: ignore[var-annotated]
    for _ in range(rounds):
        for i, ours in enumerate(both):
            answer = ours.run(ids, 1, "csa")
            assert answer.csa is not None, "the prompt is too short for CSA"
            times[i].append(answer.times.ttft)
            waits[i].append(answer.csa.seconds["exchange"])
            tokens[i].append(answer.tokens)
    (a, b), (all_wait, exposed) = map(statistics.median, times), map(statistics.median, waits)
    return [
        *(f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}x", f"{all_wait:.3f}", f"{exposed:.3f}"),
        *(f"{exposed / all_wait:.2f}", str(tokens[0] == tokens[1])),
    ]


if __name__ == "__main__":
    main()
