"""`LLM` from a user's script, and a server whose ranks a launcher started: both in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.served import serve
from megatron_sps2 import LLM
from tests.sps2_command import BIN, ROOT, TIMEOUT_S, environ, make_checkpoint, words
from tests.tiny_llama import prompt

pytestmark = pytest.mark.slow

PROMPTS = [prompt(n, seed=n).clamp(min=3).tolist() for n in (5, 700, 40)]
SCRIPT = """
import json, os, signal, sys
import psutil
from megatron_sps2 import LLM, SamplingParams

def complaint(make):
    try:
        make()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"

if __name__ == "__main__":
    prompts = json.loads(sys.argv[2])
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)
    found = {"no setting": complaint(lambda: LLM(sys.argv[1], spp=2))}
    with LLM(sys.argv[1], sp=2, dp=int(sys.argv[3]), max_model_len=2048) as llm:
        answers = llm.generate(prompts, greedy)
        found["tokens"] = [answer.token_ids for answer in answers]
        found["ranks"] = [answer.timings.sp_size for answer in answers]
        found["text"] = llm.generate(" ".join(f"w{i}" for i in prompts[0]), greedy)[0].text
        stopping = SamplingParams(max_tokens=12, ignore_eos=True, stop=(found["text"].split()[5],))
        found["stopped"] = llm.generate([prompts[0]], stopping)[0].text
        found["chat"] = llm.chat([{"role": "user", "content": "w9"}], greedy).text
        found["refused"] = complaint(lambda: llm.generate([prompts[0], [10**6]], greedy))
        found["after"] = llm.generate([prompts[0]], greedy)[0].token_ids
        ranks = [p for p in psutil.Process().children(recursive=True) if p.ppid() != os.getpid()]
        ranks[1].send_signal(signal.SIGKILL)
        found["lost"] = complaint(lambda: llm.generate(prompts, greedy))
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    make_checkpoint(folder)
    return folder


def wanted(folder: Path) -> list[list[int]]:
    hf = LlamaForCausalLM.from_pretrained(folder / "hf").eval()
    hf.generation_config.eos_token_id = None  # as with ignore_eos
    answers = (hf.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False) for ids in PROMPTS)
    return [answer[0, len(ids) :].tolist() for answer, ids in zip(answers, PROMPTS, strict=True)]


def run_script(folder: Path, num_replicas: int) -> dict[str, Any]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = (sys.executable, script, folder / "checkpoint", json.dumps(PROMPTS), num_replicas)
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S, env=environ()
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_script_gets_the_answers_of_transformers(folder: Path, num_replicas: int) -> None:
    found, tokens = run_script(folder, num_replicas), wanted(folder)
    assert found["tokens"] == tokens and found["after"] == tokens[0] and found["ranks"] == [1, 2, 1]
    text = words(token for token in tokens[0] if token > 2)
    assert found["text"] == text and text.startswith(found["stopped"]) and found["stopped"] != text
    assert found["chat"].startswith("w")
    assert found["refused"].startswith("ValueError: prompt 1: token id 1000000 at position 0 is unknown")
    assert found["no setting"] == "ValueError: spp=2 is no setting; `sps2 serve --help` lists them"
    assert found["lost"].startswith("RuntimeError: ")


def test_under_a_launcher_it_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="starts its ranks itself; under torchrun"):
        LLM("nowhere")


def test_a_server_under_torchrun_answers_and_drains(folder: Path) -> None:
    environment = {"NPROC": "2", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    script = ("bash", str(ROOT / "launch" / "torchrun.sh"))
    with serve(folder / "checkpoint", "--sp", 2, command=script, **environment) as server:
        request = urllib.request.Request(
            f"{server.base_url}/v1/completions",
            data=json.dumps(
                {"prompt": PROMPTS[1], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            ).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = json.load(reply)["choices"][0]["text"]
        assert text == words(token for token in wanted(folder)[1] if token > 2)
        family = psutil.Process(server.process.pid).children(recursive=True)
        first = next(p for p in family if p.environ().get("RANK") == "0" and "serve" in p.cmdline())
        first.send_signal(signal.SIGTERM)  # As the launcher passes it on; torchrun itself would exit with 1.
        assert server.process.wait(timeout=60) == 0
        assert psutil.wait_procs(family, timeout=5)[1] == []
