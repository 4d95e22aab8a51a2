"""`sps2 verify A B`: exit code 0 for the same model, 1 and the first difference otherwise."""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints_tools.target import check_source
from megatron_sps2.cli.convert import bar


def run(args: argparse.Namespace) -> int:
    for source in (args.first, args.second):
        check_source(Path(source))
    from checkpoints_tools.verify import verify

    with bar(f"comparing {args.first} and {args.second}") as show:
        verdict = verify(
            args.first,
            args.second,
            tolerance=args.tolerance,
            logits=args.logits,
            trust_pickle=args.trust_pickle,
            progress=show,
        )
    if verdict.difference:
        print(verdict.difference)
        return 1
    logits = "" if verdict.logits_error is None else f"; logits differ by {verdict.logits_error:.1e}"
    same = "the same bits" if args.tolerance == 0 else f"values differ by {verdict.largest_error:.1e} at most"
    print(f"equal: {verdict.num_weights} weights, {verdict.num_params:,} parameters, {same}{logits}")
    return 0
