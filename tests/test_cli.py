"""`sps2 generate`, `chat`, `convert` and `doctor` as users meet them: output, flags, exit codes."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2 import __version__
from megatron_sps2.cli.main import main, parse_args
from megatron_sps2.config import ParallelConfig
from megatron_sps2.engine.build import EngineConfig, build_engine
from megatron_sps2.engine.tokenizer import load_tokenizer
from tests.ranks import run_ranks
from tests.sps2_command import (
    SPS2,
    TEMPLATE,
    TIMEOUT_S,
    answer,
    environ,
    make_checkpoint,
    sps2,
    words,
    write_ids,
)

PROMPT = words(range(5, 25))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 query heads, 3 KV heads: tp 1 or 3."""
    return make_checkpoint(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def sampled(checkpoint: Path) -> dict[str, Any]:
    """12 random tokens of one rank."""
    return answer(*sampling(checkpoint), "--prompt", PROMPT)


def sampling(checkpoint: Path) -> tuple[object, ...]:
    flags = [
        "--max-tokens",
        "12",
        "--temperature",
        "0.9",
        "--top-k",
        "100",
        "--seed",
        "3",
        "--logprobs",
        "2",
        "--ignore-eos",
    ]
    return ("--checkpoint", checkpoint, *flags)


# Start, help, version.


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_and_version_come_without_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom megatron_sps2.cli.main import main\n"
        f"try:\n    main({args!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, timeout=TIMEOUT_S, env=environ()
    )
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout or "usage: sps2" in done.stdout


def test_help_says_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in ("(default: float32)", "(default: 64)", "(default: what this run needs", "(default: auto)"):
        assert said in text
    assert "(default: None)" not in text and "(default: [])" not in text


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--context-parallel-size 4", "sp", 4),
        ("--sequence-parallel-size 4", "sp", 4),
        ("--tensor-model-parallel-size 3", "tp", 3),
        ("--tensor-parallel-size 3", "tp", 3),
        ("--inference-max-seq-length 99", "max_model_len", 99),
        ("--max-model-len 99", "max_model_len", 99),
        ("--tokens-to-generate 9", "max_tokens", 9),
        ("--load OTHER", "checkpoint", "OTHER"),
    ],
)
def test_flags_have_the_names_that_users_of_peers_know(flags: str, name: str, value: object) -> None:
    args = parse_args(["generate", "--checkpoint", "DIR", "--prompt", "x", *flags.split()])
    assert getattr(args, name) == value


# One answer.


def test_json_is_one_object_and_nothing_else(sampled: dict[str, Any]) -> None:
    # `answer` holds stdout to one JSON object and stderr to nothing: no library warns in a normal run.
    assert sampled["prompt_tokens"] == 20 and len(sampled["token_ids"]) == 12
    assert sampled["finish_reason"] == "length"
    assert sampled["ttft_ms"] > 0 and all(sampled["tbt_ms"][key] > 0 for key in ("mean", "p50", "p99"))
    # The last token was never fed, so it holds no KV.
    assert sampled["kv_tokens_per_rank"] == [20 + 11]
    assert set(sampled["ledger"]) == {"prefill", "decode"}
    assert sampled["text"] == words(i for i in sampled["token_ids"] if i > 2)


def test_logprobs_name_the_chosen_token_and_the_likeliest(sampled: dict[str, Any]) -> None:
    assert [entry["token_id"] for entry in sampled["logprobs"]] == sampled["token_ids"]
    for entry in sampled["logprobs"]:
        likeliest = list(entry["top"].values())
        assert len(likeliest) == 2 and likeliest == sorted(likeliest, reverse=True)
        assert entry["logprob"] <= likeliest[0] + 1e-6 and entry["logprob"] < 0


def test_a_seed_gives_the_same_tokens_over_sp_ranks_and_stdin(
    checkpoint: Path, sampled: dict[str, Any]
) -> None:
    found = answer(*sampling(checkpoint), "--sp", 2, "--prompt", "-", stdin=PROMPT)
    assert found["token_ids"] == sampled["token_ids"]
    held = found["kv_tokens_per_rank"]
    assert sum(held) == 31 and max(held) - min(held) <= 1
    assert found["ledger"]["prefill"]["mean_bytes_per_rank_per_layer"] > 0
    took = found["start_up"]
    assert all(0 < load < whole for load, whole in zip(took["load_seconds"], took["seconds"], strict=True))
    assert len(took["load_seconds"]) == 2 and min(took["peak_bytes"]) > max(took["weight_bytes"]) > 0


def test_a_seed_gives_the_same_tokens_over_tp_ranks_and_settings_of_a_file(
    checkpoint: Path, sampled: dict[str, Any], tmp_path: Path
) -> None:
    """All flags but two come from the file, the checkpoint among them; the command line's seed wins."""
    config = tmp_path / "run.toml"
    config.write_text(
        f'checkpoint = "{checkpoint}"\ntensor-model-parallel-size = 3\nmax_tokens = 12\ntemperature = 0.9\n'
        "top-k = 100\nseed = 4\nlogprobs = 2\nignore-eos = true\npipeline = false\n"
    )
    found = answer("--config", config, "--prompt-file", "-", "--seed", 3, stdin=PROMPT)
    assert found["token_ids"] == sampled["token_ids"]
    assert len(found["kv_tokens_per_rank"]) == 1


def test_control_another_seed_gives_other_tokens_and_logs_come_at_debug(
    checkpoint: Path, sampled: dict[str, Any]
) -> None:
    done = sps2(
        *("generate", *sampling(checkpoint), "--prompt", PROMPT, "--seed", 4, "--json"),
        *("--log-level", "debug"),
    )
    assert json.loads(done.stdout)["token_ids"] != sampled["token_ids"]
    assert "prefill: layer 3 of 6" in done.stderr and "Warning" in done.stderr


def test_an_answer_ends_before_a_stop_string(checkpoint: Path, sampled: dict[str, Any]) -> None:
    fifth = f" w{sampled['token_ids'][4]}"
    first = sampled["text"].index(fifth)
    found = answer(*sampling(checkpoint), "--prompt", PROMPT, "--stop", "no such", "--stop", fifth)
    assert found["finish_reason"] == "stop"
    assert found["text"] == sampled["text"][:first]


def test_an_answer_ends_at_a_stop_token(checkpoint: Path, sampled: dict[str, Any]) -> None:
    third = sampled["token_ids"][2]
    found = answer(*sampling(checkpoint), "--prompt", PROMPT, "--stop-token-ids", 0, third)
    assert found["finish_reason"] == "stop"
    assert found["token_ids"] == sampled["token_ids"][: sampled["token_ids"].index(third) + 1]


def test_a_stop_string_that_the_last_token_completes_is_why_the_answer_ended(
    checkpoint: Path, sampled: dict[str, Any]
) -> None:
    fifth = f" w{sampled['token_ids'][4]}"
    flags = (*sampling(checkpoint), "--prompt", PROMPT, "--stop", fifth)
    found = answer(*flags, "--max-tokens", 5)
    assert (found["finish_reason"], len(found["token_ids"])) == ("stop", 5)
    # Control: one token earlier there is no stop string yet.
    assert answer(*flags, "--max-tokens", 4)["finish_reason"] == "length"


# A conversation.


def test_a_turn_that_cannot_be_encoded_is_refused_and_the_chat_goes_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    strict = shutil.copytree(checkpoint, tmp_path / "strict")
    refusal = "{% if 'w13' in messages[-1].content %}{{ raise_exception('no w13') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refusal + TEMPLATE)
    done = sps2("chat", "--checkpoint", strict, "--max-tokens", 3, stdin="w7 w13\nw8\n")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert done.stderr == "sps2: the chat template refuses these messages: no w13\n"


def test_a_template_that_takes_no_system_message_is_refused_before_the_first_turn(
    checkpoint: Path, tmp_path: Path
) -> None:
    strict = shutil.copytree(checkpoint, tmp_path / "strict")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refusal + TEMPLATE)
    done = sps2("chat", "--checkpoint", strict, "--sp", 2, "--system", "w9", stdin="w7\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sps2: error: the chat template refuses these messages: no system\n"


def test_input_that_is_no_text_ends_a_chat_of_two_ranks(checkpoint: Path) -> None:
    command = (*SPS2, "chat", "--checkpoint", str(checkpoint), "--sp", "2")
    done = subprocess.run(
        command, input=b"\xff\xfe\n", capture_output=True, timeout=TIMEOUT_S, env=environ(PYTHONUTF8="1")
    )
    assert done.returncode == 1 and b"stdin cannot be read as text" in done.stderr


def test_a_second_turn_prefills_only_new_tokens_and_answers_as_a_fresh_run(
    checkpoint: Path, tmp_path: Path
) -> None:
    flags = ("--checkpoint", checkpoint, "--sp", 2, "--max-tokens", 6)
    done = sps2("chat", *flags, "--log-level", "info", stdin="w7 w8 w9\nw10 w11\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    lengths = [line.split("prompt of ")[1] for line in done.stderr.splitlines() if "prompt of" in line]
    # Turn 1: 5 tokens, of which the answer's last was never fed. Turn 2 adds that one, and 4 of its own.
    assert lengths == ["5 tokens, 0 of them cached", f"{5 + 6 + 4} tokens, {5 + 5} of them cached"]
    messages = [("user", "w7 w8 w9"), ("assistant", first), ("user", "w10 w11")]
    ids = load_tokenizer(checkpoint).encode_chat([{"role": r, "content": c} for r, c in messages])
    fresh = answer(*flags, "--prompt-ids", write_ids(tmp_path / "ids.json", ids))
    assert fresh["prompt_tokens"] == 15 and fresh["text"] == second


# Settings from a file.


def parse_with(config: Path, text: str, *flags: str) -> Any:
    config.write_text(text)
    return parse_args(["generate", *flags, "--config", str(config)])


def test_flags_win_over_the_file_wherever_they_stand(tmp_path: Path) -> None:
    text = 'checkpoint = "A"\nprompt = "from the file"\nsp = 2\nstop = ["x", "-y"]\nstop-token-ids = [1, 2]\n'
    args = parse_with(tmp_path / "c.toml", text, "--sp", "1", "--prompt-ids", "F")
    # --prompt-ids excludes --prompt: the file's prompt gives way.
    assert (args.checkpoint, args.sp, args.prompt, args.prompt_ids) == ("A", 1, None, "F")
    assert (args.stop, args.stop_token_ids) == (["x", "-y"], [1, 2])
    given = parse_with(tmp_path / "c.toml", text, "--stop", "z")
    assert (given.stop, given.prompt, given.sp) == (["z"], "from the file", 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("speed = 9", "speed is not a flag of this command"),
        ('sp = "two"', "sp = 'two' must be an integer"),
        ("sp = true", "sp = True must be an integer"),
        ("pipeline = 1", "pipeline = 1 must be true or false"),
        ('stop = "x"', "stop = 'x' must be a list, each a string"),
        ("[sp]\nsize = 2", "sp = {'size': 2} must be an integer"),
        ('dtype = "int8"', "invalid choice: 'int8'"),
        ("sp =", "Invalid value"),
    ],
)
def test_a_file_with_a_mistake_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_with(tmp_path / "c.toml", text, "--checkpoint", "A", "--prompt", "x")
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_file_that_is_missing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["generate", "--config", "/no/such.toml", "--checkpoint", "A", "--prompt", "x"])
    assert "/no/such.toml" in capsys.readouterr().err


# What a checkpoint needs, and where it comes from.


def _kept_bytes(checkpoint: Path, sp_size: int, tp_size: int, dtype: str, kept: str) -> tuple[int, int]:
    """On a rank: bytes of the parameters it really keeps, and of its KV cache."""
    parallel = ParallelConfig(sp_size=sp_size, tp_size=tp_size)
    engine = build_engine(
        EngineConfig(
            checkpoint=str(checkpoint),
            parallel=parallel,
            dtype=dtype,  # type: ignore[arg-type]
            kv_cache_dtype=kept,  # type: ignore[arg-type]
            max_model_len=1000,
        )
    )
    forward = engine._runner._forward
    kept = {id(p): p for p in (*forward.gpt.parameters(), forward._output_weight)}
    return sum(p.numel() * p.element_size() for p in kept.values()), engine.kv_bytes


@pytest.mark.parametrize(
    ("sp_size", "tp_size", "dtype", "kept", "tied"),
    [(2, 1, "float32", "auto", False), (1, 3, "bfloat16", "auto", True), (2, 1, "bfloat16", "fp8", False)],
)
def test_doctor_says_the_memory_that_an_engine_takes(
    checkpoint: Path, tmp_path: Path, sp_size: int, tp_size: int, dtype: str, kept: str, tied: bool
) -> None:
    if tied:
        checkpoint = make_checkpoint(tmp_path, tie_word_embeddings=True)
    done = sps2(
        *("doctor", "--checkpoint", checkpoint, "--sp", sp_size, "--tp", tp_size, "--dtype", dtype),
        *("--kv-cache-dtype", kept, "--max-model-len", 1000, "--json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)["memory per rank"]
    measure = functools.partial(_kept_bytes, checkpoint, sp_size, tp_size, dtype, kept)
    assert (
        run_ranks(sp_size * tp_size, measure)
        == [(said["weights_bytes"], said["kv_bytes"])] * sp_size * tp_size
    )


def test_doctor_names_the_backend_of_the_device_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "one")
    asked = (("cpu", "auto", "gloo"), ("auto", "auto", "nccl"), ("cuda", "gloo", "gloo"))
    for device, wanted, backend in asked:
        assert main(["doctor", "--device", device, "--backend", wanted, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["machine"]["backend"] == backend


def test_doctor_runs_without_a_checkpoint_and_refuses_ranks_that_do_not_fit(checkpoint: Path) -> None:
    done = sps2("doctor")
    assert done.returncode == 0 and "threads per rank" in done.stdout and done.stderr == ""
    refused = sps2("doctor", "--checkpoint", checkpoint, "--tp", 2)
    assert refused.returncode == 2 and "use --tp 1 or 3" in refused.stderr


def empty_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: (folder / "none", folder / "new"), "does not exist"),
        (
            lambda folder: (empty_folder(folder / "old"), folder / "new"),
            "no .gguf or llama2.c file, no folder with config.json",
        ),
        (lambda folder: (write_ids(folder / "a.gguf", [1]), folder / "new"), "a.gguf"),
    ],
)
def test_convert_refuses_what_it_cannot_read(tmp_path: Path, make: Any, complaint: str) -> None:
    done = sps2("convert", *make(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("sps2: error: ") and done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert not (tmp_path / "new").exists()


def test_convert_replaces_a_checkpoint_only_when_told_to_and_nothing_else_ever(
    checkpoint: Path, tmp_path: Path
) -> None:
    source, target, mine = checkpoint.parent / "hf", tmp_path / "target", tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    never = sps2("convert", source, mine, "--force")
    assert never.returncode == 2 and "never replaced; give another folder" in never.stderr
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]
    shutil.copytree(checkpoint, target)
    refused = sps2("convert", source, target)
    assert refused.returncode == 2 and "--force" in refused.stderr
    done = sps2("convert", source, target, "--force", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target}: 6 layers, hidden 72, vocabulary 251\n"
    assert json.loads((target / "sps2_model.json").read_text())["dtype"] == "bfloat16"


def test_a_profile_of_two_ranks_prices_their_link_and_simulates(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "here.json"
    flags = ("--sp", 2, "--max-model-len", 1024, "--budget-s", 1, "--out", out)
    done = sps2("profile", "--checkpoint", checkpoint, *flags)
    assert done.returncode == 0 and out.is_file(), done.stderr
    profile = json.loads(out.read_text())
    assert profile["source"].startswith("measured") and profile["notes"]["fit"]["num_steps"] > 30
    assert sum(profile["overheads"].values()) + profile["intra"]["latency_s"] > 0
    asked = ("--model", checkpoint, "--dtype", "float32", "--sp", 2, "--trace", "1:64-500:9")
    shown = sps2("simulate", "--profile", out, *asked, "--trace-format", "synthetic", "--json", "-")
    assert json.loads(shown.stdout)["total_output_tokens"] == 900
