"""`sps2 reshard SRC DST`: a Megatron checkpoint cut for other tp and pp sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints_tools.target import check_target
from megatron_sps2.cli.convert import bar, say


def run(args: argparse.Namespace) -> int:
    # Again in there, but only once torch is loaded.
    check_target(Path(args.source), Path(args.target), args.force)
    from checkpoints_tools.convert import reshard

    with bar(f"opening {args.source}", last=f"writing {args.target}") as show:
        model = reshard(
            args.source,
            args.target,
            tp_size=args.tp,
            pp_size=args.pp,
            force=args.force,
            trust_pickle=args.trust_pickle,
            progress=show,
        )
    say(args.target, model)
    return 0
