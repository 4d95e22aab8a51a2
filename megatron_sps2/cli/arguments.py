"""The flags of every command and the settings they make. Names are those of Megatron and vLLM users."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_sps2.cli.launch_arguments import ALONE, add_launch
from megatron_sps2.config import (
    ATTENTION_MODES,
    DTYPES,
    KERNEL_CHOICES,
    KV_CACHE_DTYPES,
    PREFILL_STRATEGIES,
    AttentionConfig,
    ModelConfig,
    ParallelConfig,
    SamplingParams,
)
from megatron_sps2.csa_setting import CALIBRATION_NAME, PRESETS, CsaSetting, choose_setting

Commands = Any  # argparse does not export the type of add_subparsers()
# The second spelling is that of DeepSpeed's own scripts.
DEEPSPEED_FLAGS = ("--deepspeed-config", "--deepspeed_config")
AUTO = "auto"  # of --sp and --tp, until cli/layout.py has chosen


class _Help(argparse.HelpFormatter):
    """Adds the default to a flag's help where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_said = action.help and "default" in action.help
        default = action.default
        if is_said or default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


def add_generate(commands: Commands, name: str) -> None:
    parser = command(commands, name, "answer one prompt and print the text, a report or JSON")
    _add_prompt(parser)
    add_engine(parser)
    _add_sampling(parser, max_tokens=64)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
    output.add_argument("--report", action="store_true", help="end with a table of times, KV and bytes sent")
    finish(parser)


def add_chat(commands: Commands, name: str) -> None:
    parser = command(commands, name, "talk with the model; the KV cache is kept between turns")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    add_engine(parser)
    _add_sampling(parser, max_tokens=256)
    finish(parser)


def add_csa(commands: Commands, name: str) -> None:
    parser = command(
        commands, name, "find CSA budgets for a model, or draw what a CSA setting costs and saves"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_calibrate(actions, "calibrate")
    _add_csa_report(actions, "report")


def _add_calibrate(actions: Commands, name: str) -> None:
    parser = command(actions, name, "choose budgets by layer and KV head that keep a share of the attention")
    _add_measured_text(parser)
    parser.add_argument(
        "--floor",
        type=float,
        default=0.95,
        metavar="X",
        help="share of the attention to keep, the mean over queries that had no part in choosing keys",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="pieces of the text to run (default: as many as fit, to 4)"
    )
    parser.add_argument(
        "--segment-size",
        type=int,
        default=PRESETS["default"].segment_size,
        metavar="N",
        help="tokens of a segment, a multiple of 8",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=PRESETS["default"].window,
        metavar="N",
        help="tokens just before a segment that are kept whatever the budgets",
    )
    parser.add_argument(
        "--budget",
        choices=("adaptive", "fixed"),
        default="adaptive",
        help="adaptive: floors, which keep as many keys as a prompt needs; fixed: shares of keys by distance",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"where to write (default: {CALIBRATION_NAME} in the checkpoint's folder)",
    )
    parser.add_argument("--force", action="store_true", help="replace the file that is there")
    _finish_alone(parser)


def _add_csa_report(actions: Commands, name: str) -> None:
    parser = command(actions, name, "measure settings on a text; write images and one HTML page")
    _add_measured_text(parser)
    _add_csa_setting(parser)
    parser.add_argument(
        "--sp",
        type=int,
        default=8,
        dest="num_ranks",
        metavar="P",
        help="sequence-parallel ranks to count bytes for; the run itself is on one",
    )
    parser.add_argument(
        "--settings",
        default="fast,default,careful,strided,local,paper",
        metavar="A,B,C",
        help="presets or JSON files to compare, beside --csa-setting and the checkpoint's own calibration",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    _finish_alone(parser)


def check_size_flags(args: argparse.Namespace, model: ModelConfig) -> None:
    """Raises ValueError for ranks or lengths that do not fit the model."""
    parallel_config(args).check_model(model)
    if args.block_size < 1:
        raise ValueError(f"--block-size {args.block_size} must be at least 1")
    if args.max_model_len is not None and not 1 <= args.max_model_len <= model.max_seq_len:
        raise ValueError(
            f"--max-model-len {args.max_model_len} must lie in 1..{model.max_seq_len}, what the model allows"
        )


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    return ParallelConfig(dp_size=getattr(args, "dp", 1), sp_size=args.sp, tp_size=args.tp)


def size_or_auto(text: str) -> int | str:
    """The type of --sp and --tp."""
    return AUTO if text == AUTO else int(text)


def attention_config(args: argparse.Namespace) -> AttentionConfig:
    return AttentionConfig(
        mode=args.attention,
        csa_min_tokens=args.csa_min_tokens,
        strategy=args.strategy,
        pipeline=args.pipeline,
        kernels=args.kernels,
    )


def csa_setting(args: argparse.Namespace) -> CsaSetting:
    """Raises ValueError or FileNotFoundError for one that cannot be had."""
    return choose_setting(args.csa_setting, args.checkpoint)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_ids),
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
    )


def command(commands: Commands, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what, formatter_class=_Help, allow_abbrev=False
    )
    return parser


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    prompt = group.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself; - is stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 text file with the prompt; - is stdin")
    prompt.add_argument("--prompt-ids", metavar="FILE", help="a JSON file, a list of token ids; - is stdin")
    group.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")


def add_checkpoint(parser: argparse._ActionsContainer, required: bool) -> None:
    parser.add_argument(
        *("--checkpoint", "--load"),
        required=required,
        metavar="DIR",
        help="a folder made by `sps2 convert`",
    )


def add_parallel(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        *("--sp", "--sequence-parallel-size", "--context-parallel-size"),
        type=size_or_auto,
        default=1,
        metavar="P",
        help="sequence-parallel ranks: each computes and keeps its part of the sequence; auto: what "
        "--tp leaves",
    )
    parser.add_argument(
        *("--tp", "--tensor-model-parallel-size", "--tensor-parallel-size"),
        type=size_or_auto,
        default=1,
        metavar="T",
        help="tensor-parallel ranks: each has its part of the weights and heads; auto: the fewest with which "
        "the model and the longest prompt fit the devices",
    )
    parser.add_argument(
        *DEEPSPEED_FLAGS,
        metavar="FILE",
        help="DeepSpeed's JSON configuration: sizes of tp, sp and dp, dtype and max_out_tokens are read; "
        "--config and the command line win",
    )


def add_memory(parser: argparse._ActionsContainer, longest: str) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of weights, KV and computing"
    )
    add_kv_cache_dtype(parser)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one"
    )
    parser.add_argument(
        *("--max-model-len", "--inference-max-seq-length"),
        type=int,
        metavar="N",
        help=f"tokens of prompt and answer at most (default: {longest})",
    )
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="tokens per KV cache block")


def add_kv_cache_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="what the KV cache keeps: auto as --dtype; fp8 float8_e4m3 with a scale for each token and KV "
        "head, a half to a quarter of the memory and a little less accurate",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and ranks")
    add_checkpoint(group, required=True)
    add_parallel(group)
    add_memory(group, longest="what this run needs; chat: max_seq_len of the model")
    group.add_argument(
        "--attention",
        choices=ATTENTION_MODES,
        default="exact",
        help="how a prompt attends: exact to all tokens, csa to those its setting keeps, auto exact below "
        "--csa-min-tokens and csa from there on",
    )
    _add_csa_setting(group)
    group.add_argument(
        "--csa-min-tokens",
        type=int,
        metavar="N",
        help="where --attention auto begins to use CSA (default: where its attention should take a third of "
        "exact's time)",
    )
    group.add_argument(
        "--strategy",
        choices=PREFILL_STRATEGIES,
        default="auto",
        help="how a prompt attends across sp ranks; changes the speed, not the result",
    )
    group.add_argument(
        "--pipeline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="from 1,024 tokens on, overlap the exchange of a head chunk with the attention of another; same "
        "result (default: on)",
    )
    group.add_argument(
        "--kernels",
        choices=KERNEL_CHOICES,
        default="auto",
        help="what computes attention; auto: triton on CUDA devices, numba on a CPU (decoding), where it is "
        "installed, else torch",
    )
    group.add_argument(
        "--enforce-eager",
        action="store_true",
        help="launch every decode step anew, also where a CUDA graph of it could be replayed",
    )
    add_launch(parser)


def add_replicas(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        *("--dp", "--data-parallel-size"),
        type=int,
        default=1,
        metavar="D",
        help="replicas of the model, each on sp x tp ranks; requests go to the least busy one",
    )


def _add_csa_setting(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--csa-setting",
        metavar="NAME|FILE",
        help=f"a preset ({', '.join(PRESETS)}) or a JSON file (default: {CALIBRATION_NAME} beside the "
        "checkpoint where there is one, else the preset default)",
    )


def _add_measured_text(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, required=True)
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text file to measure on")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens of a prompt")


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        *("--max-tokens", "--tokens-to-generate"),
        type=int,
        default=max_tokens,
        metavar="N",
        help="tokens of the answer at most",
    )
    group.add_argument(
        "--min-tokens", type=int, default=0, metavar="N", help="no end before this many tokens"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="the N likeliest tokens; 0 is all")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="the likeliest tokens that hold X together"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="tokens at least X times as likely as the first"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: say less again; 1 is off"
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="same tokens at any --tp and --sp in float32; in bfloat16 rounding differs a little between "
        "layouts",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    group.add_argument(
        "--stop-token-ids", type=int, nargs="*", default=[], metavar="ID", help="end at any of these tokens"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end of text")
    group.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probability of each token and the K likeliest"
    )


def finish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of these flags, such as sp = 2; the command line wins"
    )
    add_log_level(parser)


def _finish_alone(parser: argparse.ArgumentParser) -> None:
    """Of a command that measures on one rank of the CPU."""
    add_log_level(parser)
    parser.set_defaults(sp=1, tp=1, device="cpu", **ALONE)


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="warning", help="on stderr"
    )
