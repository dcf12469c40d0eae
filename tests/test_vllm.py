"""HiRA adapters in real vLLM servers, beside the merged folders in such servers, and transformers; `make test-vllm`."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest
import serving_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hira import HiraError, merge_checkpoint
from hira.serving.push import push

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; `make test-vllm` installs its build for CPUs", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)  # a server on a busy machine may take two minutes to start
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # which need not import everything again
    # without it vLLM on a CPU waits for a library that it does not find
    "LD_PRELOAD": str(Path(sys.prefix, "lib", "libiomp5.so")),
}
TOKENS = 16
# log-probabilities of float32 logits up to 30, computed in another order by transformers than by vLLM
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


class Answer(NamedTuple):
    """The tokens of an answer, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


class Server(NamedTuple):
    """A server that starts, or runs."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def wait(self) -> None:
        """Wait until it answers; an error if it ends."""
        while self.process.poll() is None:
            try:
                urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(self.log.read_text())

    def answers(self) -> list[Answer]:
        """Greedy answers to the prompts."""
        content = {"model": "m", "prompt": prompts(), "max_tokens": TOKENS, "temperature": 0, "logprobs": 0}
        content |= {"return_token_ids": True, "ignore_eos": True}
        choices = post(f"{self.url}/v1/completions", content)["choices"]
        return [Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def post(url: str, content: dict[str, Any]) -> Any:
    with urlopen(
        Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"}), timeout=300
    ) as found:
        return json.load(found)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (20,), generator=generator)
    return [torch.randint(4, serving_models.WORDS, (int(n),), generator=generator).tolist() for n in lengths]


@contextmanager
def serving(model: Path, log: Path, adapters: list[Path] | None = None) -> Iterator[Server]:
    """A server of a model, on a free port of this machine; in the load format hira where there are adapters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # the command `vllm` of the build for CPUs asks for the version of the package vllm, which it is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *OPTIONS]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", port]
    if adapters is not None:
        extra = json.dumps({"adapters": [str(adapter) for adapter in adapters]})
        command += ["--load-format", "hira", "--model-loader-extra-config", extra]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, text=True
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        process.wait(60)


def expected(model: Path) -> list[Answer]:
    """Greedy answers of transformers."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(TOKENS):
                ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], dim=1)
            logprobs = network(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        tokens = ids[0, len(prompt) :]
        found.append(Answer(tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist()))
    return found


def assert_same_answers(found: list[Answer], wanted: list[Answer]) -> None:
    assert len(found) == 20
    assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), **CLOSE)


def merged(folder: Path, adapters: list[Path]) -> Path:
    """The folder of a merged model, written by `hira merge`."""
    out = folder / f"merged-{len(adapters)}"
    merge_checkpoint(folder / "base", adapters, out)
    return out


def assert_serves(hira: Server, other: Server, model: Path) -> list[Answer]:
    """One server answers as another does, and as transformers does with a merged folder; return the answers."""
    found = hira.answers()
    assert_same_answers(found, other.answers())
    assert_same_answers(found, expected(model))
    return found


def tokens_of(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


@contextmanager
def both_servers(folder: Path, adapters: list[Path], model: Path) -> Iterator[tuple[Server, Server]]:
    """A server of a base model with adapters, and one of the merged folder; they start at the same time."""
    logs = [folder / f"{kind}-{len(adapters)}.log" for kind in ("hira", "merged")]
    with serving(folder / "base", logs[0], adapters) as hira, serving(model, logs[1]) as other:
        hira.wait()
        other.wait()
        yield hira, other


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_answers_are_those_of_the_merged_folder_and_of_transformers(name, tmp_path):
    """With both adapters from the start, then with the first alone, without a restart."""
    folder = serving_models.made(name, tmp_path)
    two, one = [folder / "a0", folder / "a1"], [folder / "a0"]
    models = [merged(folder, adapters) for adapters in (two, one)]
    with both_servers(folder, two, models[0]) as (hira, other):
        before = assert_serves(hira, other, models[0])
        push(one, hira.url)
        post(f"{other.url}/pause?mode=wait", {})
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(models[1])}}
        post(f"{other.url}/collective_rpc", reload)
        post(f"{other.url}/resume", {})
        after = assert_serves(hira, other, models[1])
        assert tokens_of(before) != tokens_of(after) != tokens_of(expected(folder / "base"))
        if name == "qwen":  # whose second adapter leaves the head tied to the embeddings
            with pytest.raises(HiraError, match=r"share.*Restart"):
                push([folder / "a1"], hira.url)
        with pytest.raises(HiraError, match="nowhere"):
            push([Path("nowhere")], hira.url)
        assert hira.answers() == after


def test_a_model_with_experts(tmp_path):
    folder = serving_models.made("mixtral", tmp_path)
    found = []
    for adapters in ([folder / "a0", folder / "a1"], [folder / "a0"]):
        model = merged(folder, adapters)
        with both_servers(folder, adapters, model) as (hira, other):
            found.append(assert_serves(hira, other, model))
            with pytest.raises(HiraError, match=r"experts.*restart"):
                push(adapters, hira.url)
            assert hira.answers() == found[-1]
    assert tokens_of(found[0]) != tokens_of(found[1]) != tokens_of(expected(folder / "base"))


def spoiled(folder: Path, kind: str) -> Path:
    """A copy of an adapter that is wrong in some way, under the name of that."""
    out = folder / kind
    shutil.copytree(folder / "a0", out)
    config, weights = out / "adapter_config.json", out / "adapter_model.safetensors"
    if kind == "lora":
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "LORA"}))
    elif kind == "nan":
        tensors = load_file(weights)
        next(iter(tensors.values()))[0, 0] = torch.nan
        save_file(tensors, weights)
    elif kind == "incomplete":
        weights.unlink()
    elif kind == "stranger":
        other = shutil.copytree(folder / "base", folder / "other") / "model.safetensors"
        save_file({key: tensor + 1 for key, tensor in load_file(other).items()}, other, {"format": "pt"})
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(other.parent)}))
    return out


def test_a_wrong_adapter_stops_the_server_at_the_start(tmp_path):
    folder = serving_models.made("llama", tmp_path)
    with serving(folder / "base", tmp_path / "log", [spoiled(folder, "nan")]) as server:
        with pytest.raises(RuntimeError, match=r"HiraError: tensor 'base_model\.model\.\S+' of the adapter \S+/nan"):
            server.wait()
        assert server.process.wait(60) != 0


IN_PROCESS = """
import json, sys
from vllm import LLM, SamplingParams
from hira import HiraError

model, right, wrong, prompts = json.load(sys.stdin)
options = dict(load_format="hira", dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
options["distributed_executor_backend"] = "uni"
errors = []
for extra in wrong:
    try:
        LLM(model, model_loader_extra_config=extra, **options)
    except (HiraError, ValueError) as error:
        errors.append(f"{type(error).__name__}: {error}")
llm = LLM(model, model_loader_extra_config=right, **options)
prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
print("FOUND", json.dumps([errors, [list(output.outputs[0].token_ids) for output in outputs]]))
"""


def test_in_a_process_of_ones_own(tmp_path):
    folder = serving_models.made("llama", tmp_path)
    resized = folder / "vocabulary"
    shutil.copytree(folder / "a0", resized)
    tensors = load_file(resized / "adapter_model.safetensors")
    for table in ("lm_head", "model.embed_tokens"):
        tensors[f"base_model.model.{table}.weight"] = torch.zeros(serving_models.WORDS + 8, 64)
    save_file(tensors, resized / "adapter_model.safetensors")
    right = {"adapters": str(folder / "a0"), "weights": [0.5]}
    wrong = [
        ({"adapters": [spoiled(folder, "lora")]}, r"HiraError.*lora.*peft_type 'LORA'"),
        (
            {"adapters": [spoiled(folder, "nan")]},
            r"HiraError: tensor 'base_model\.model\.\S+' of the adapter \S+/nan has a NaN",
        ),
        ({"adapters": [spoiled(folder, "incomplete")]}, r"HiraError.*incomplete has no adapter_model\.safetensors"),
        (
            {"adapters": [spoiled(folder, "stranger")]},
            r"HiraError: the adapter \S+/stranger was trained on \S+/other, and the weights of \S+/base are others",
        ),
        ({"adapters": [resized]}, r"HiraError: the adapters make \S+ \(136, 64\).*\(128, 64\)"),
        ({}, r"HiraError: the load format hira needs the folders of adapters"),
        ({"adapters": []}, r"HiraError: there is no adapter"),
        ({**right, "weights": [1, 2]}, r"HiraError: weights must be"),
        ({**right, "any_base": "yes"}, r"HiraError: any_base .* must be true or false"),
        ({**right, "ranks": 1}, r"ValueError: .*ranks"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS],
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        input=json.dumps([folder / "base", right, [extra for extra, _ in wrong], prompts()], default=str),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    errors, tokens = json.loads(done.stdout.rpartition("FOUND ")[2])
    for error, (extra, pattern) in zip(errors, wrong, strict=True):
        assert re.search(pattern, error), (extra, error)
    merge_checkpoint(folder / "base", folder / "a0", folder / "half", weights=[0.5])
    assert tokens == tokens_of(expected(folder / "half"))
