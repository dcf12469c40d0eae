"""HiRA adapters in real vLLM servers, beside the merged folders in such servers, and transformers; `make test-vllm`."""

from __future__ import annotations

import json
import os
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


@pytest.mark.parametrize("name", serving_models.CASES)
def test_answers_are_those_of_the_merged_folder_and_of_transformers(name, tmp_path):
    """With both adapters from the start, then with the first alone, without a restart."""
    folder = serving_models.made(name, tmp_path)
    both = [folder / "a0", folder / "a1"]
    for out, adapters in (("both", both), ("one", both[:1])):
        merge_checkpoint(folder / "base", adapters, folder / out)
    with (
        serving(folder / "base", tmp_path / "hira.log", both) as hira,
        serving(folder / "both", tmp_path / "log") as other,
    ):
        hira.wait()
        other.wait()
        wanted = other.answers()
        assert_same_answers(hira.answers(), wanted)
        assert_same_answers(hira.answers(), expected(folder / "both"))
        assert [answer.tokens for answer in wanted] != [answer.tokens for answer in expected(folder / "base")]

        push(both[:1], hira.url)
        post(f"{other.url}/pause?mode=wait", {})
        post(
            f"{other.url}/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder / "one")}}
        )
        post(f"{other.url}/resume", {})
        one = hira.answers()
        assert_same_answers(one, other.answers())
        assert_same_answers(one, expected(folder / "one"))
        assert [answer.tokens for answer in one] != [answer.tokens for answer in wanted]

        if name == "qwen":  # whose second adapter leaves the head tied to the embeddings
            with pytest.raises(HiraError, match=r"share.*Restart"):
                push(both[1:], hira.url)
        with pytest.raises(HiraError, match="nowhere"):
            push([Path("nowhere")], hira.url)
        assert hira.answers() == one


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

model, right, *wrong = sys.argv[1:]
options = dict(load_format="hira", dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
errors = []
for adapter in wrong:
    try:
        LLM(model, model_loader_extra_config={"adapters": [adapter]}, distributed_executor_backend="uni", **options)
    except HiraError as error:
        errors.append(str(error))
llm = LLM(model, model_loader_extra_config={"adapters": [right]}, distributed_executor_backend="uni", **options)
prompts = [{"prompt_token_ids": prompt} for prompt in json.load(sys.stdin)]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
print("FOUND", json.dumps([errors, [list(output.outputs[0].token_ids) for output in outputs]]))
"""


def test_in_a_process_of_ones_own(tmp_path):
    folder = serving_models.made("llama", tmp_path)
    named = {
        "lora": r"lora.*peft_type 'LORA'",
        "nan": r"tensor 'base_model\.model\.\S+' of the adapter \S+/nan has a NaN",
        "incomplete": r"incomplete has no adapter_model\.safetensors",
        "stranger": r"the adapter \S+/stranger was trained on \S+/other, and the weights of \S+/base are others",
    }
    folders = [folder / "base", folder / "a0", *(spoiled(folder, kind) for kind in named)]
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, *map(str, folders)],
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        input=json.dumps(prompts()),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    errors, tokens = json.loads(done.stdout.rpartition("FOUND ")[2])
    for error, pattern in zip(errors, named.values(), strict=True):
        with pytest.raises(HiraError, match=pattern):
            raise HiraError(error)
    merge_checkpoint(folder / "base", folder / "a0", folder / "one")
    assert tokens == [answer.tokens for answer in expected(folder / "one")]
