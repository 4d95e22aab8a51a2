"""Made-up turns of settings, and the shape of a model, for the tests of `sps2 bench compare`."""

from typing import Any

from megatron_sps2.bench.record import Record
from megatron_sps2.bench.setting import Setting, parse_settings
from megatron_sps2.bench.turns import Turn
from megatron_sps2.config import ModelConfig, ParallelConfig

SP2 = ParallelConfig(sp_size=2)
NAMES = ["sps2-csa", "sps2-exact", "sarathi-512"]


def model(num_heads: int, num_groups: int) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "head_dim": 8, "vocab_size": 251}
    return ModelConfig(**sizes, num_attention_heads=num_heads, num_query_groups=num_groups, max_seq_len=512)


def record(index: int, sent: float, times: list[float], tokens: list[str], **changes: Any) -> Record:
    values: dict[str, Any] = {
        "index": index,
        "due_s": sent,
        "num_prompt_tokens": 100,
        "num_asked_tokens": len(times),
        "sent_s": sent,
        "end_s": times[-1] if times else sent,
        "chunk_times": times,
        "chunk_tokens": [1] * len(times),
        "num_output_tokens": len(times),
        "tokens": tokens,
    }
    return Record(**{**values, **changes})


def settings(*names: str) -> list[Setting]:
    return parse_settings(",".join(names), SP2)


def turn(setting: str, number: int, ttft: float, tokens: str, **changes: Any) -> Turn:
    records = [record(0, 0.0, [ttft, ttft + 1, ttft + 2], list(tokens), **changes)]
    return Turn(load=1.0, round=number, setting=setting, records=records)
