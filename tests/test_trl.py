"""The reference of TRL's trainers: the base model for a new adapter, and a trained adapter for itself."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from trl_models import llama, tokenizer

trl = pytest.importorskip("trl")

IDS = torch.tensor([[3, 4, 5, 6]])
NAME = "base_model.model.model.layers.0.self_attn.q_proj.hira_B."
CASES = {
    "DPO": {"prompt": ["a b", "c"], "chosen": [" d", " e f"], "rejected": [" g", " h"]},
    "KTO": {"prompt": ["a b", "c"], "completion": [" d", " e f"], "label": [True, False]},
    "GRPO": {"prompt": ["a b", "c"]},
    "RLOO": {"prompt": ["a b", "c"]},
}


def trained(folder, **options) -> PeftModel:
    """A model with an adapter that was trained before."""
    config = HiraConfig(r=4, init_weights=False, **{"target_modules": ["q_proj", "embed_tokens"], **options})
    get_peft_model(llama(), config).save_pretrained(folder)
    return PeftModel.from_pretrained(llama(), folder, is_trainable=True)


def trainer(kind: str, model, folder, steps: int = 1, rate: float = 0.0, **more):
    cls, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    options = {"output_dir": folder, "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    options |= {"max_steps": steps, "learning_rate": rate, "logging_steps": 1, "disable_tqdm": True}
    if kind in ("GRPO", "RLOO"):
        options |= {"beta": 0.1, "num_generations": 2, "max_completion_length": 4}
        more["reward_funcs"] = lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))]
    args = config(per_device_train_batch_size=2, **options)
    data = Dataset.from_dict(CASES[kind])
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def outputs(model: PeftModel) -> dict[str, torch.Tensor]:
    model.eval()
    found = {}
    with torch.no_grad():
        for name in ("default", "ref"):
            model.set_adapter(name)
            found[name] = model(input_ids=IDS).logits
        with model.disable_adapter():
            found["base"] = model(input_ids=IDS).logits
    model.set_adapter("default")
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in CASES), ("DPO", {"hira_alpha": 8}), ("DPO", {"modules_to_save": ["lm_head"]})],
)
def test_the_reference_is_the_adapter(kind, options, tmp_path):
    model = trainer(kind, trained(tmp_path, **options), tmp_path / "out").model
    found = outputs(model)
    assert torch.equal(found["ref"], found["default"])
    assert not torch.allclose(found["ref"], found["base"], atol=1e-3)
    for name, parameter in model.named_parameters():
        if name.endswith(".ref"):
            of_default = model.get_parameter(name.removesuffix("ref") + "default")
            assert torch.equal(parameter, of_default)
            assert parameter.data_ptr() != of_default.data_ptr()
            assert not parameter.requires_grad


def references(kind: str, monkeypatch) -> list[torch.Tensor]:
    """The logits of IDS wherever the trainer has switched to its reference."""
    module = sys.modules[getattr(trl, f"{kind}Trainer").__module__]
    use_adapter, found = module.use_adapter, []

    @contextmanager
    def recording(model, adapter_name):
        with use_adapter(model, adapter_name):
            found.append(model(input_ids=IDS).logits.detach())
            yield

    monkeypatch.setattr(module, "use_adapter", recording)
    return found


@pytest.mark.parametrize("start", ["new", "trained"])
@pytest.mark.parametrize("kind", CASES)
def test_the_reference_stays_while_the_adapter_trains(kind, start, tmp_path, monkeypatch):
    found = references(kind, monkeypatch)
    if start == "new":
        model, config = llama(), HiraConfig(r=4, hira_alpha=8, target_modules=["q_proj", "v_proj", "embed_tokens"])
        more = {"peft_config": config}
    else:
        model, more = trained(tmp_path, hira_alpha=8), {}
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    made = trainer(kind, model, tmp_path / "out", steps=3, rate=0.1, **more)
    start_of = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    assert len(found) >= 3
    assert all(torch.equal(logits, before) for logits in found)
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, start_of[name]) != name.endswith(".default"), name
        assert parameter.requires_grad == name.endswith(".default")
    with torch.no_grad():
        assert not torch.allclose(made.model.eval()(input_ids=IDS).logits, before, atol=1e-2)


def test_a_resumed_run_has_the_reference_that_it_began_with(tmp_path):
    """The trainer saves the reference beside the adapter, in a folder of its own, and loads both over those it has."""
    trained(tmp_path / "start", hira_alpha=8)

    def run(folder, **resuming):
        model = PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
        made = trainer("DPO", model, folder, steps=4, rate=0.1)
        made.args.save_steps = 2
        made.train(**resuming)
        return dict(made.model.named_parameters())

    straight = run(tmp_path / "straight")
    assert (tmp_path / "straight" / "checkpoint-2" / "ref" / "adapter_model.safetensors").is_file()
    resumed = run(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert [name for name, value in straight.items() if not torch.equal(value, resumed[name])] == []
    assert not torch.equal(straight[NAME + "default"], straight[NAME + "ref"])


def test_the_loss_of_the_first_step_is_log_2(tmp_path):
    """At the first step the adapter has moved nowhere from its reference."""
    result = trainer("DPO", trained(tmp_path), tmp_path / "out").train()
    assert result.training_loss == pytest.approx(0.6931472, abs=1e-6)


def test_ranks_that_a_file_decided_are_those_of_the_reference(tmp_path):
    """A file's rank r wins over its rank_pattern; the reference is of that rank too."""
    config = {"target_modules": ["q_proj", "v_proj"]}
    model = trained(tmp_path, **config)
    model.peft_config["default"].rank_pattern = {"v_proj": 2}
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert model.get_base_model().model.layers[0].self_attn.v_proj.r == {"default": 4}
    found = outputs(trainer("DPO", model, tmp_path / "out").model)
    assert torch.equal(found["ref"], found["default"])


def test_other_callers_get_a_new_adapter():
    model = get_peft_model(llama(), HiraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    config = model.peft_config["default"]
    model.add_adapter("ref", config)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.hira_A["ref"], layer.hira_A["default"])


def test_lora_is_left_alone(tmp_path):
    get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path
    )
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    found = outputs(trainer("DPO", model, tmp_path / "out").model)
    assert torch.equal(found["ref"], found["default"])
