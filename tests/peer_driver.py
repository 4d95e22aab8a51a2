"""A peer that measures nothing: answers at once, prints as engines do, breaks or hangs by --setting."""

from __future__ import annotations

import argparse
import time

from benchmarks.peers.protocol import Answer, Driver, serve


class Fake(Driver):
    def prefill(self, ids: list[int]) -> Answer:
        print("an engine's own news on stdout")
        if not ids:
            raise ValueError("an empty prompt")
        time.sleep(60 if len(ids) > 3 else 0)
        return 0.5, ids[:1]


def build(args: argparse.Namespace) -> tuple[Driver, str]:
    if args.setting == "broken":
        raise ImportError("no such kernel\nand a long story")
    return Fake(), f"fake on {args.threads} threads"


if __name__ == "__main__":
    serve(build, __doc__)
