"""What TRL's trainers do to an adapter: its dtype, tokens that it trains, the losses that see it, what vLLM is sent."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForSequenceClassification
from trl_models import llama, llama_config, tokenizer

import hira

trl = pytest.importorskip("trl")

IDS = torch.tensor([[3, 4, 5, 6]])
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
TEXTS = {"text": ["a b c d", "e f g h"] * 4}
PAIRS = {"chosen": ["a b c", "d e"] * 4, "rejected": ["x y", "z w v"] * 4}
ROWS = {
    "SFT": TEXTS,
    "DPO": {"prompt": ["a b", "c"], "chosen": [" d", " e f"], "rejected": [" g", " h"]},
    "KTO": {"prompt": ["a b", "c"], "completion": [" d", " e f"], "label": [True, False]},
    "GRPO": {"prompt": ["a b", "c"]},
    "RLOO": {"prompt": ["a b", "c"]},
    "Reward": PAIRS,
    "Distillation": {"prompt": ["a b", "c"]},
}


def trainer(kind: str, model, rows, folder, config=None, processing_class=None, **options):
    common = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    sizes = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2}
    more = {"peft_config": config} if config else {}
    if kind == "Distillation":
        more["teacher_model"] = llama()
    if kind in ("GRPO", "RLOO"):
        common |= {"num_generations": 2, "beta": 0.1}
        more["reward_funcs"] = lambda completions, **kwargs: [0.0] * len(completions)
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **{**common, **sizes, **options}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=processing_class or tokenizer(),
        **more,
    )


def factors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".hira_" in name}


def dtypes(model, part: str) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if part in name}


def losses(made) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


# Base models of 4 and 8 bits


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a causal model and of a reward model, wide enough for blocks of 64 weights."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    llama(**sizes).save_pretrained(folder / "causal")
    LlamaForSequenceClassification(llama_config(**sizes, num_labels=1)).save_pretrained(folder / "reward")
    return folder


def quantised(bases: Path, bits: int, kind: str = "SFT"):
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    cls, name = (LlamaForSequenceClassification, "reward") if kind == "Reward" else (AutoModelForCausalLM, "causal")
    return cls.from_pretrained(bases / name, quantization_config=config)


@pytest.mark.parametrize(("kind", "bits"), [*((kind, 4) for kind in ROWS), ("SFT", 8)])
def test_factors_stay_in_float32_on_a_quantised_model(kind, bits, bases, tmp_path):
    config = HiraConfig(r=4, hira_alpha=8, target_modules=TARGETS)
    made = trainer(kind, quantised(bases, bits, kind), ROWS[kind], tmp_path, config)
    assert dtypes(made.model, ".hira_") == {torch.float32}


def test_what_is_not_hira_s_is_cast_as_trl_does(bases, tmp_path):
    """So TRL still casts; if it does so no more, `keeping_float32` can go."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    made = trainer("SFT", quantised(bases, 4), TEXTS, tmp_path, lora)
    assert dtypes(made.model, ".lora_") == dtypes(made.model, "modules_to_save") == {torch.bfloat16}
    model = quantised(bases, 4)
    made = trainer(
        "SFT", model, TEXTS, tmp_path, HiraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert dtypes(made.model, "modules_to_save") == {torch.bfloat16}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_trained_adapter_is_not_rounded(bits, bases, tmp_path):
    config = HiraConfig(r=4, hira_alpha=8, target_modules=TARGETS, init_weights=False)
    get_peft_model(quantised(bases, bits), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(quantised(bases, bits), tmp_path, is_trainable=True)
    before = {name: value.clone() for name, value in factors(model).items()}
    made = trainer("DPO", model, ROWS["DPO"], tmp_path / "out", learning_rate=1e-2)
    for name, value in before.items():
        assert torch.equal(made.model.get_parameter(name), value)
        assert torch.equal(made.model.get_parameter(name.replace(".default", ".ref")), value)
        assert not torch.equal(value, value.bfloat16().float())


def test_training_on_4_bits(bases, tmp_path):
    """Under TRL's own settings: bfloat16 autocast and gradient checkpointing."""
    config = HiraConfig(r=4, hira_alpha=8, target_modules=TARGETS)
    made = trainer("SFT", quantised(bases, 4), TEXTS, tmp_path, config)
    assert made.args.bf16 and made.args.gradient_checkpointing
    made.train()
    assert losses(made)[-1] < losses(made)[0] - 0.1
    made.save_model(str(tmp_path / "adapter"))
    again = factors(PeftModel.from_pretrained(quantised(bases, 4), tmp_path / "adapter"))
    assert all(torch.equal(again[name], value) for name, value in factors(made.model).items())


# ZeRO-3


class Captured(Exception):
    pass


def test_zero_3_has_the_factors_in_the_base_model_s_dtype(tmp_path, monkeypatch):
    """TRL asks PEFT not to make them float32, since DeepSpeed takes one dtype; the test needs no DeepSpeed."""
    asked = {}

    def get_peft_model_of_trl(model, config, **options):
        asked.update(options)
        raise Captured

    monkeypatch.setattr("trl.trainer.sft_trainer.get_peft_model", get_peft_model_of_trl)
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    config = HiraConfig(r=4, hira_alpha=8, target_modules=TARGETS)
    with pytest.raises(Captured):
        trl.SFTTrainer(
            llama(), args, train_dataset=Dataset.from_dict(TEXTS), processing_class=tokenizer(), peft_config=config
        )
    assert asked == {"autocast_adapter_dtype": False}
    model = get_peft_model(llama().bfloat16(), config, **asked)
    assert dtypes(model, ".hira_") == {torch.bfloat16}


@pytest.mark.parametrize("flag", ["fsdp", "deepspeed_plugin"])
def test_nothing_is_left_out_where_a_model_is_sharded(flag):
    """FSDP and DeepSpeed take one dtype; the function stands for a constructor of TRL."""
    model = get_peft_model(llama(), HiraConfig(r=4, target_modules=["q_proj"]))
    scope = {"__name__": "trl.trainer.any"}
    exec("def __init__(model, args): return dict(model.named_parameters())", scope)
    args = SimpleNamespace(fsdp=None, deepspeed_plugin=None)
    whole = dict(model.named_parameters())
    assert scope["__init__"](model, args).keys() == whole.keys() - factors(model).keys()
    setattr(args, flag, True)
    assert scope["__init__"](model, args).keys() == whole.keys()


ZERO_3 = """
import sys
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, which takes a minute
import torch
from datasets import Dataset
from deepspeed.utils import safe_get_full_fp32_param
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from hira import HiraConfig
from trl_models import llama, tokenizer

sharding = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
sizes = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
options = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True, "bf16": {"enabled": True}}
args = SFTConfig(
    output_dir=sys.argv[1], report_to=[], use_cpu=True, max_steps=8, learning_rate=1e-2, logging_steps=1,
    per_device_train_batch_size=2, deepspeed={**sizes, **options, "zero_optimization": sharding},
)
rows = Dataset.from_dict({"text": ["a b c d", "e f g h"] * 4})
config = HiraConfig(r=4, hira_alpha=8, target_modules="all-linear")
made = SFTTrainer(llama().bfloat16(), args, train_dataset=rows, processing_class=tokenizer(), peft_config=config)
made.train()
losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
assert losses[-1] < losses[0] - 0.1, losses
for name, parameter in made.model.named_parameters():
    if ".hira_" in name:
        assert parameter.dtype == torch.bfloat16
        value = safe_get_full_fp32_param(parameter)
        assert value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float()), name
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero_3_steps_copies_in_float32(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    environment = {**os.environ, **one, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", ZERO_3, str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr


# Losses and trained parts


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' }}{% generation %}{{ m['content'] + ' <eos>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_assistant_tokens_is_that_of_the_merged_model(packing, tmp_path):
    words = tokenizer()
    words.chat_template = TEMPLATE
    turns = [("a b c", "d e"), ("f g", "h i j")] * 4
    rows = [[{"role": "user", "content": u}, {"role": "assistant", "content": a}] for u, a in turns]
    config = HiraConfig(r=4, init_weights=False, target_modules=TARGETS)
    options = {"assistant_only_loss": True, "packing": packing, "max_length": 16, "bf16": False}
    made = trainer("SFT", llama(), {"messages": rows}, tmp_path, config, processing_class=words, **options)
    batch = next(iter(made.get_train_dataloader()))
    labels = batch["labels"]
    assert -100 in labels
    merged = copy.deepcopy(made.model).merge_and_unload()
    assert not torch.allclose(merged(input_ids=IDS).logits, llama()(input_ids=IDS).logits, atol=1e-3)
    logits = merged(**{name: value for name, value in batch.items() if name != "labels"}).logits
    exact = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(made.compute_loss(made.model, dict(batch)), exact)
    made.train()
    assert losses(made)[-1] < losses(made)[0]


@pytest.mark.parametrize("own", [None, {"embed_tokens": [5]}])
def test_tokens_that_a_chat_template_adds_are_trained(own, tmp_path):
    """TRL puts them into `trainable_token_indices`, with others that fill up to 64, and trains the output layer."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    words.chat_template = "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    words.save_pretrained(tmp_path / "words")
    rows = [[{"role": "user", "content": "a b c"}, {"role": "bot", "content": "d e"}]] * 8
    config = HiraConfig(r=4, hira_alpha=8, target_modules=["q_proj", "down_proj"], trainable_token_indices=own)
    options = {"chat_template_path": str(tmp_path / "words"), "bf16": False}
    made = trainer("SFT", llama(), {"messages": rows}, tmp_path, config, **options)
    user, bot = made.processing_class.convert_tokens_to_ids(["<user>", "<bot>"])
    trained = {*config.trainable_token_indices["embed_tokens"]}
    assert trained == {*range(29, 64), *([5] if own else [])}
    embedding = made.model.get_input_embeddings()
    before = embedding(torch.arange(64)).detach().clone()
    made.train()
    assert losses(made)[-1] < losses(made)[0] - 0.1
    assert config.modules_to_save == ["lm_head"]
    moved = (embedding(torch.arange(64)) != before).any(dim=1).nonzero().flatten().tolist()
    assert {user, bot} <= {*moved} <= trained
    made.save_model(str(tmp_path / "adapter"))
    base = llama()
    base.resize_token_embeddings(64)  # its new rows are others: all of them come with the adapter
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[user, 3, 4, bot, 6]])
    torch.testing.assert_close(again(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)


def test_a_reward_model_trains_and_saves_its_head(tmp_path):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=1))
    model.save_pretrained(tmp_path / "base")
    config = HiraConfig(task_type="SEQ_CLS", r=4, hira_alpha=8, target_modules="all-linear", modules_to_save=["score"])
    made = trainer("Reward", model, PAIRS, tmp_path, config, bf16=False, max_steps=8)
    start = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    assert losses(made)[-1] < losses(made)[0] - 0.1
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save.default" in name for name in moved)
    made.save_model(str(tmp_path / "adapter"))
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, made.model.eval()(input_ids=IDS).logits)


def test_an_adapted_output_layer_is_refused_as_lora_s_is(tmp_path):
    """The trainers multiply by the output layer's weight themselves, and ask for PEFT's base class of layers."""
    with pytest.raises(ValueError, match="lm_head"):
        trainer("SFT", llama(), TEXTS, tmp_path, HiraConfig(r=4, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("config", [HiraConfig, LoraConfig])
def test_weight_decay_reaches_the_adapter(config, tmp_path):
    made = trainer(
        "SFT", llama(), TEXTS, tmp_path, config(r=4, target_modules=["q_proj", "embed_tokens"]), weight_decay=0.1
    )
    made.create_optimizer()
    assert [(group["weight_decay"], len(group["params"])) for group in made.optimizer.param_groups] == [
        (0.1, 4),
        (0.0, 0),
    ]


# What vLLM is sent


def test_vllm_is_sent_the_merged_weights():
    """GRPO and RLOO merge, send the base model's names and their values, and unmerge; vLLM itself is not asked."""
    from trl.generation.vllm_generation import VLLMGeneration

    config = HiraConfig(r=4, target_modules=TARGETS, init_weights=False, modules_to_save=["lm_head"])
    model = get_peft_model(llama(), config)
    sent = {}
    client = SimpleNamespace(
        update_named_params=lambda metadata, parameters: sent.update({name: p.clone() for name, p in parameters}),
        reset_prefix_cache=lambda: None,
    )
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model, generation.mode, generation.vllm_client, generation._weight_metadata = (
        model,
        "server",
        client,
        None,
    )
    generation.accelerator = SimpleNamespace(is_main_process=True)
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generation.sync_weights()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, hira.HiraLayer))
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert sent.keys() == merged.keys()
    assert all(torch.equal(sent[name], merged[name]) for name in merged)
    assert not torch.equal(
        sent["model.layers.0.self_attn.q_proj.weight"], llama().model.layers[0].self_attn.q_proj.weight
    )
