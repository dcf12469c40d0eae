"""The recipes run from end to end on small models, have the published sizes, and are documented as they are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from benchmarks import tiny_lm
from peft import PeftModel
from PIL import Image
from recipes import prepare
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hira.training.finetune.arguments import parse
from hira.training.finetune.launch import launch_flags
from hira.training.finetune.run import finetune

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
DIALOGUE = """\
1 your persona: i like to ski.
2 your persona: i have a dog.
3 hello , how are you ?\ti am fine , just back from the slopes .\t\tno|yes
4 do you have pets ?\tone dog .\t\tno|yes
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a Llama of one layer, with a tokenizer over bytes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    return folder


def downloaded(recipe: str, folder: Path) -> Path:
    """A file in the form of the one that the recipe's data set has, of 130 rows."""
    if recipe == "convai2":
        path = folder / "train_self_original.txt"
        path.write_text(DIALOGUE * 65)
        return path
    names = ("instruction", "output") if recipe == "commonsense" else ("query", "response")
    rows = [
        {**dict(zip(names, (f"Is {i} even?", str(i % 2 == 0)), strict=True)), "type": "made up"} for i in range(130)
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("recipe", ["commonsense", "convai2", "metamath", "peft_metamathqa"])
def test_a_recipe_runs(recipe, model, tmp_path, monkeypatch):
    """Its data is prepared and checked, the model adapted as it says and trained, the best checkpoint kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    wanted = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    source = downloaded(recipe, tmp_path)
    prepare.main([recipe.replace("_", "-"), str(source), "--output", wanted["dataset_name"]])
    command = ["--config", str(RECIPES / f"{recipe}.yaml"), "--model_name_or_path", str(model)]
    command += ["--max_steps", "3", "--logging_steps", "1", "--disable_tqdm", "true", "--warmup_steps", "0"]
    if "eval_steps" in wanted:
        command += ["--eval_steps", "2", "--save_steps", "2"]
    finetune(command)

    folder = Path(wanted["output_dir"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], "hira_alpha" in config) == ("HIRA", 32, False)
    assert sorted(config["target_modules"]) == sorted(wanted["hira_target_modules"])
    factors = load_file(folder / "adapter_model.safetensors")
    assert any(factor.any() for name, factor in factors.items() if name.endswith("hira_B"))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert len([entry["loss"] for entry in state["log_history"] if "loss" in entry]) == 3
    assert (state["best_model_checkpoint"] is not None) == ("eval_steps" in wanted)


def test_the_prepared_rows(tmp_path):
    """What a model sees, and what the loss is of."""
    (tmp_path / "dialogue.txt").write_text(DIALOGUE)
    assert list(prepare.convai2(tmp_path / "dialogue.txt")) == [
        {
            "prompt": "CONTEXT: P: i like to ski. i have a dog. Q: hello , how are you ? TARGET:",
            "completion": " i am fine , just back from the slopes .",
        },
        {
            "prompt": "CONTEXT: P: i like to ski. i have a dog. Q: hello , how are you ? "
            "R: i am fine , just back from the slopes . Q: do you have pets ? TARGET:",
            "completion": " one dog .",
        },
    ]
    rows = [{"query": "1 + 1?", "response": "It is 2. The answer is: 2"}, {"query": "?", "response": "x" * 1300}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(prepare.peft_metamathqa(tmp_path / "rows.jsonl")) == [
        {"prompt": "Question: 1 + 1? Think step by step.\nAnswer:", "completion": "It is 2. The answer is: 2"}
    ]
    assert [row["completion"][:3] for row in prepare.metamath(tmp_path / "rows.jsonl")] == [" It", " xx"]


@pytest.mark.parametrize(
    ("recipe", "text", "named"),
    [
        ("commonsense", '[{"instruction": "a"}]', "row 1.*output"),
        ("metamath", '{"query": "a", "response": 3}\n', "row 1.*response"),
        ("convai2", "1 your persona: a\n2 no reply\n", ":2: .*no reply"),
        ("commonsense", '[{"instruction": "a", "output": "b"}]', "1 rows"),
    ],
)
def test_other_files_are_refused(recipe, text, named, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(SystemExit, match=named):
        prepare.main([recipe, str(tmp_path / "file"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_paper_s_recipes_differ_in_data_and_epochs_alone():
    first, *others = (
        yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("commonsense", "convai2", "metamath")
    )
    for other in others:
        assert {name for name in first if first[name] != other[name]} == {
            "dataset_name",
            "num_train_epochs",
            "output_dir",
        }
    assert [recipe["num_train_epochs"] for recipe in (first, *others)] == [3, 1, 2]


def test_the_readme_has_the_computed_table():
    """And the published numbers of trained parameters."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from recipes import memory

    readme = memory.README.read_text()
    assert memory.with_table(readme) == readme
    table = readme.partition(memory.BEGIN)[2].partition("<!--")[0]
    assert all(published in table for published in ("0.7002 %", "0.8256 %", "9,175,040", "38,338,560"))


def test_the_documented_commands(monkeypatch):
    """Each has the published number of rows in a step, and accelerate's launcher takes it."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "recipes.md").read_text()
    commands = [shlex.split(line)[2:] for line in re.findall(r"^(hira finetune .*)$", page, re.MULTILINE)]
    assert {command[1] for command in commands} == {f"recipes/{path.name}" for path in RECIPES.glob("*.yaml")}
    launched = 0
    for command in commands:
        arguments = parse([*command, "--use_cpu", "true", "--bf16", "false"])
        training, count = arguments.training, arguments.run.num_processes or 1
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * count
        assert rows == (4 if "peft" in command[1] else 32)
        if arguments.run.accelerate_config:
            flags = launch_flags(arguments)
            given = dict(zip(flags[::2], flags[1::2], strict=True))
            assert given["--num_processes"] == "4" and given["--config_file"].endswith("fsdp2.yaml")
            launched += 1
    assert launched == 4


def test_flux(tmp_path, monkeypatch):
    """The cat's images are prepared, a small FLUX.2 learns them, and generates with the adapter."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

    from recipes import flux2_klein

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.new("RGB", (40, 40), (25 * i, 10, 200)).save(tmp_path / "images" / f"{i}.png")
    prompts = tmp_path / "default_training_params.json"
    prompts.write_text(json.dumps({"instance_prompts": [f"cat {i}" for i in range(9)]}))
    prepare.main(["cat", str(tmp_path / "images"), "--prompts", str(prompts), "--output", str(tmp_path / "cat")])
    rows = [json.loads(line) for line in (tmp_path / "cat" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        index = int(row["prompt"].removeprefix("cat "))
        assert Image.open(tmp_path / "cat" / row["file_name"]).getpixel((0, 0)) == (25 * index, 10, 200)

    pipeline = flux(diffusers)
    pipeline.save_pretrained(tmp_path / "flux")
    options = ["--images", tmp_path / "cat", "--model", tmp_path / "flux", "--output", tmp_path / "out"]
    options += ["--steps", 3, "--resolution", 32, "--text_layers", 1, 2, 2]
    found = flux2_klein.main([str(option) for option in options])
    assert len(found) == 3 and all(0 < loss < 100 for loss in found)

    texts = pipeline.encode_prompt("cat 1", text_encoder_out_layers=(1, 2, 2))[0]
    images = {}
    for name in ("before", "after"):
        if name == "after":
            pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path / "out")
        generator = torch.Generator().manual_seed(0)
        given = {"prompt_embeds": texts, "negative_prompt_embeds": texts, "generator": generator}
        sizes = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
        images[name] = pipeline(**given, **sizes).images
    assert images["after"].shape == (1, 3, 32, 32)
    assert not torch.equal(images["before"], images["after"])


def flux(diffusers):
    """A pipeline of FLUX.2-klein's classes, with a few thousand weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    text = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    channels = {"block_out_channels": (4,), "latent_channels": 4, "norm_num_groups": 1}
    vae = diffusers.AutoencoderKLFlux2(**blocks, **channels, layers_per_block=1)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=48, guidance_embeds=False, **heads
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.Flux2KleinPipeline(scheduler, vae, text, tokenizer, transformer)
