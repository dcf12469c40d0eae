"""`hira finetune` from end to end: what it trains, from which data, and what it leaves."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from commands import run_in_this_process
from datasets import ClassLabel, Dataset, Features, Value
from finetune_runs import history, losses, with_changed
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hira
from hira import HiraError
from hira.training.finetune.arguments import parse
from hira.training.finetune.classifier import labels_of
from hira.training.finetune.dataset import Data
from hira.training.finetune.launch import launch_flags
from hira.training.finetune.packages import NEEDED
from hira.training.finetune.run import finetune

LEARNS = {"hira_r": 8, "learning_rate": 3e-2, "per_device_train_batch_size": 8}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ROWS = [
    {"text": f"import {letter}" if label else f"The {letter} is", "label": label}
    for letter in "abcdefghijklmnop"
    for label in (0, 1)
]


def test_a_language_model(pretrained, flags):
    """The loss falls; the adapter, its card and the curve are there, and PEFT loads the adapter."""
    flags = with_changed(flags, max_steps=30, measure_steps=20, **LEARNS)
    flags += [
        "--hub_token",
        "my secret",
        "--test_split_size",
        "0.1",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "15",
        "--eval_on_start",
        "true",
    ]
    ended = run_in_this_process("finetune", *flags)
    assert ended.returncode == 0, ended.stderr
    before, half, *_, after = [entry["eval_loss"] for entry in history() if "eval_loss" in entry]
    assert before - 0.1 > half > after
    assert any(name.startswith("hira/relative_norm/") for entry in history() for name in entry)
    assert "180 to train on, 20 to evaluate on" in ended.stdout
    assert "adapted: 4 q_proj" in ended.stdout and "trainable params: 78,848" in ended.stdout
    assert "30 steps, training loss" in ended.stdout

    card = Path("out/README.md").read_text()
    for fact in ("reference.jsonl", "r 8, hira_alpha 16", "78,848 of ", "evaluation loss", "hira finetune --"):
        assert fact in card
    assert "secret" not in card
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads(Path("out/all_results.json").read_text())
    assert metrics["eval_loss"] == after and math.isfinite(metrics["train_loss"])

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pretrained / "model"), "out")
    assert sum(isinstance(module, hira.HiraLayer) for module in loaded.modules()) == 28
    ids = AutoTokenizer.from_pretrained("out")("The statement", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list(b"The statement")]
    with loaded.disable_adapter(), torch.no_grad():
        before = loaded(input_ids=ids, labels=ids).loss
    assert loaded(input_ids=ids, labels=ids).loss < before - 0.1


def test_a_dry_run_loads_nothing_and_writes_nothing(flags, monkeypatch):
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    ended = run_in_this_process("finetune", *flags, "--dry-run", "--num_processes", "2")
    assert ended.returncode == 0, ended.stderr
    assert "trainable params: 39,424 || all params: 908,928 || trainable%: 4.3374" in ended.stdout
    assert "memory, about: " in ended.stdout
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt", "folder", "mixture"])
def test_local_data(kind, flags, write):
    rows = Dataset.from_list(ROWS)
    if kind == "mixture":
        Path("run.yaml").write_text(
            f"datasets:\n  - path: json\n    data_files: {write(ROWS)}\n    columns: [text]\n"
            f"  - path: {write(ROWS[:8], 'more.jsonl')}\n    columns: [text]\n"
        )
        flags, count = [*with_changed(flags, dataset_name=None), "--config", "run.yaml"], 40
    elif kind == "folder":
        Path("data").mkdir()
        write(ROWS, "data/train.jsonl")
        write(ROWS[:4], "data/test.jsonl")
        flags, count = with_changed(flags, dataset_name="data", eval_strategy="steps", eval_steps=2), 32
    else:
        {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(kind, lambda name: Path(name).write_text("a\nb\n" * 16))(
            f"rows.{kind}"
        )
        flags, count = with_changed(flags, dataset_name=f"rows.{kind}"), 32
    ended = run_in_this_process("finetune", *with_changed(flags[:-2], max_steps=2), *flags[-2:])
    assert ended.returncode == 0, ended.stderr
    assert f"{count} to train on" in ended.stdout
    assert ("4 to evaluate on" in ended.stdout) == (kind == "folder")
    assert len(losses()) == 2


def test_a_learning_rate_that_is_loras_is_warned_of(flags):
    """Where alpha is switched off, and not where it is on."""
    flags = with_changed(flags, learning_rate=2e-4, max_steps=1)
    with pytest.warns(UserWarning, match="hira_alpha"):
        finetune([*flags, "--hira_alpha", "none"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*hira_alpha")
        finetune(with_changed(flags, output_dir="other"))


def test_packing(flags):
    finetune([*with_changed(flags, max_steps=2), "--packing", "--packing_strategy", "wrapped"])
    assert [entry["num_tokens"] for entry in history() if "loss" in entry] == [4 * 48, 8 * 48]  # no padding


def test_the_loss_is_of_the_completion_alone(flags, write):
    """The prompts differ, the first losses do not; over the whole text they would."""
    first = {}
    for whole in (False, True):
        for prompt in ("a b c ", "x y z w v "):
            name = write([{"prompt": prompt, "completion": "0"}] * 4)
            changed = with_changed(flags, dataset_name=name, output_dir=f"{whole}{prompt[0]}", max_steps=1)
            finetune([*changed, *(["--completion_only_loss", "false"] if whole else [])])
            state = history(f"{whole}{prompt[0]}")[0]
            first[whole, prompt] = state["num_tokens"], state["loss"]
    (short, _), (long, _) = first[False, "a b c "], first[False, "x y z w v "]
    assert (short, long) == (4 * 8, 4 * 12)
    assert all(first[False, prompt] != first[True, prompt] for prompt in ("a b c ", "x y z w v "))


def test_messages_need_a_chat_template(flags, write):
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    flags = with_changed(flags, dataset_name=write(chat), max_steps=2)
    with pytest.raises(HiraError, match="chat_template"):
        finetune(flags)
    Path("chat.jinja").write_text(TEMPLATE)
    finetune([*flags, "--chat_template_path", "chat.jinja"])
    tokens = history()[0]["num_tokens"]
    assert tokens == 4 * len("user: a\nassistant: b\n")


@pytest.mark.parametrize("names", [None, ("prose", "code")])
def test_a_classifier(names, pretrained, flags, write):
    rows = [{**row, "label": names[row["label"]]} if names else row for row in ROWS]
    flags = with_changed(flags, dataset_name=write(rows), max_steps=30, test_split_size=0.25)
    ended = run_in_this_process("finetune", *flags, "--task_type", "SEQ_CLS")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(Path("out/all_results.json").read_text())["eval_accuracy"] == 1
    assert "evaluation accuracy 1.0000" in ended.stdout
    assert "evaluation accuracy | 1 |" in Path("out/README.md").read_text()

    base = AutoModelForSequenceClassification.from_pretrained(pretrained / "model", num_labels=2, pad_token_id=0)
    loaded = PeftModel.from_pretrained(base, "out").eval()
    batch = AutoTokenizer.from_pretrained("out")([row["text"] for row in ROWS], return_tensors="pt", padding=True)
    order = [sorted(names).index(names[row["label"]]) if names else row["label"] for row in ROWS]
    assert (loaded(**batch).logits.argmax(-1) == torch.tensor(order)).float().mean() > 0.9


def test_a_row_without_a_class_is_refused():
    """Hidden labels of test splits on the hub are -1."""
    arguments = parse(["--task_type", "SEQ_CLS"])
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_list([{"text": "x", "label": 0}, {"text": "y", "label": 1}], features=features)
    hidden = Dataset.from_list([{"text": "z", "label": -1}], features=features)
    assert labels_of(arguments, Data(rows, None, [])) == [0, 1]
    with pytest.raises(HiraError, match="-1"):
        labels_of(arguments, Data(rows, hidden, []))
    with pytest.raises(HiraError, match="two"):
        labels_of(arguments, Data(Dataset.from_dict({"text": ["x"], "label": ["a"]}), None, []))


@pytest.mark.parametrize("option", ["packing", "completion_only_loss", "assistant_only_loss", "padding_free"])
def test_a_classifier_refuses_what_is_for_language_models(option, flags):
    with pytest.raises(HiraError, match=option):
        finetune([*flags, "--task_type", "SEQ_CLS", f"--{option}", "true"])


def test_a_4_bit_base(flags):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    finetune([*with_changed(flags, max_steps=20, **LEARNS), "--load_in_4bit"])
    assert sum(losses()[-5:]) < sum(losses()[:5])


def test_what_is_reported_goes_where_it_is_asked_to(flags, monkeypatch):
    with pytest.raises(HiraError, match="nowhere"):
        finetune([*flags, "--report_to", "nowhere"])
    monkeypatch.setattr("hira.training.finetune.trainers.get_available_reporting_integrations", lambda: [])
    with pytest.raises(HiraError, match="tensorboard"):
        finetune([*flags, "--report_to", "tensorboard"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_name_or_path": None}, "model_name_or_path"),
        ({"model_name_or_path": "nowhere/at/all"}, "nowhere"),
        ({"dataset_name": None}, "dataset_name"),
        ({"dataset_name": "none.jsonl"}, "none.jsonl"),
        ({"dataset_name": "data/none"}, "no file or folder data/none"),
        ({"datasets": "more.jsonl"}, "both"),
        ({"dataset_train_split": "half"}, "half"),
        ({"eval_strategy": "epoch"}, "test_split_size"),
        ({"hira_target_modules": "no_such_proj"}, "no_such_proj"),
        ({"resume_from_checkpoint": "true"}, "checkpoint"),
        ({"resume_from_checkpoint": "elsewhere"}, "elsewhere"),
        ({"accelerate_config": "zero9"}, "zero3"),
        ({"accelerate_config": "fsdp2"}, "accelerator"),
        ({"accelerate_config": "ddp"}, "num_processes"),
        ({"fp16": True}, "GPU"),
        ({"eos_token": "<none>"}, "<none>"),
        ({"packing": True, "max_length": "none"}, "max_length"),
        ({"dataset_streaming": True, "test_split_size": 0.5}, "test_split_size"),
        ({"dataset_streaming": True, "task_type": "SEQ_CLS", "dataset_label_field": "text"}, "streamed"),
    ],
)
def test_refusals(changes, named, flags, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    ended = run_in_this_process("finetune", *with_changed(flags, **changes))
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("hira: ") and named in ended.stderr
    assert not Path("out").exists()


def test_a_malformed_row_is_refused_before_a_model_is_loaded(flags, monkeypatch):
    monkeypatch.setattr("hira.training.finetune.trainers.trainer_for", None)
    Path("rows.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    ended = run_in_this_process("finetune", *with_changed(flags, dataset_name="rows.jsonl"))
    assert ended.returncode == 1 and "hira: rows.jsonl:2: text is of type int" in ended.stderr


def test_missing_values_that_only_the_loaded_data_has(flags):
    Path("rows.csv").write_text("text\na\nNA\n")  # pandas takes NA for a missing value
    with pytest.raises(HiraError, match="row 2: text is empty"):
        finetune(with_changed(flags, dataset_name="rows.csv"))
    Path("rows.csv").write_text("text\n1\n2\n")
    with pytest.raises(HiraError, match="text is of type int"):
        finetune(with_changed(flags, dataset_name="rows.csv"))


def test_an_adapter_is_not_overwritten(flags):
    Path("out").mkdir()
    Path("out/adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(HiraError, match="output_dir"):
        finetune(flags)
    assert Path("out/adapter_model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("package", ["trl", "datasets", "accelerate", "matplotlib"])
def test_a_missing_package_is_named(package, flags, monkeypatch):
    there = {name: name for name in NEEDED if name != package}
    monkeypatch.setattr("hira.training.finetune.packages.find_spec", there.get)
    ended = run_in_this_process("finetune", *flags)
    assert ended.returncode == 1
    assert ended.stderr == f"hira: hira finetune needs {package}: pip install 'hira[train]'.\n"


def test_all_gpus_are_used(flags, monkeypatch):
    """As many processes as there are GPUs, unless their number is given or this is one of them."""
    launches, trained = [], []
    monkeypatch.setattr("hira.training.finetune.run.launch", lambda arguments: launches.append(arguments.command))
    monkeypatch.setattr(
        "hira.training.finetune.run._train", lambda trainer, arguments, *_: trained.append(arguments.command)
    )
    monkeypatch.setattr("hira.training.finetune.trainers.trainer_for", lambda *_: None)
    one = [*flags, "--num_processes", "1"]
    finetune(flags)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    for command in (flags, one):
        finetune(command)
    finetune(flags, launched=True)
    assert launches == [flags] and trained == [flags, one, flags]


def test_what_accelerate_is_given(flags, monkeypatch):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 3)
    given = launch_flags(parse([*with_changed(flags, accelerate_config="zero3", bf16=True)]))
    options = dict(zip(given[::2], given[1::2], strict=True))
    assert options["--config_file"].endswith("zero3.yaml")
    assert (options["--num_processes"], options["--mixed_precision"]) == ("3", "bf16")
    assert options["--fsdp_cpu_ram_efficient_loading"] == "false"
    Path("mine.yaml").write_text("num_processes: 4\n")
    given = launch_flags(parse([*with_changed(flags, accelerate_config="mine.yaml")]))
    assert "mine.yaml" in given and "--num_processes" not in given
