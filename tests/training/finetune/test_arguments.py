"""The arguments of `hira finetune`: TRL's and HiRA's are taken, LoRA's are refused by name, mistakes have a line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hira import HiraError
from hira.training.finetune.arguments import RATE, parse

YAML = """\
# a comment
model_name_or_path: base
learning_rate: 1e-3
hira_alpha: 16
hira_rank_pattern: {v_proj: 8}
hira_target_modules: [q_proj, v_proj]
packing: true
datasets:
  - path: json
    data_files: a.jsonl
  - path: b.csv
test_split_size: 0.1
"""


@pytest.fixture
def config(tmp_path):
    def written(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return written


def test_a_file_in_trls_names_and_flags_above_it(config):
    arguments = parse(["--config", config(YAML), "--hira_r", "4", "--packing", "false", "--max-steps", "3"])
    adapter = arguments.config()
    assert (adapter.r, adapter.hira_alpha, adapter.rank_pattern) == (4, 16, {"v_proj": 8})
    assert adapter.target_modules == {"q_proj", "v_proj"}
    training = arguments.training
    assert (training.learning_rate, training.packing, training.max_steps) == (1e-3, False, 3)
    assert [each.path for each in arguments.mixture.datasets] == ["json", "b.csv"]
    assert arguments.mixture.test_split_size == 0.1
    assert not arguments.classifies


def test_the_file_of_the_documentation(config):
    page = Path(__file__).parents[3] / "docs" / "training.md"
    text = re.search(r"```yaml\n(# hira finetune.*?)```", page.read_text(), re.DOTALL)[1]
    arguments = parse(["--config", config(text)])
    assert arguments.config().target_modules == "all-linear"
    assert [each.path for each in arguments.mixture.datasets] == ["chats.jsonl", "trl-lib/Capybara"]


def test_the_file_may_be_named_in_one_word(config):
    assert parse([f"--config={config(YAML)}"]).model.model_name_or_path == "base"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 64),
        (["--hira_r", "8"], 16),
        (["--hira_alpha", "24"], 24),
        (["--hira_alpha", "none"], None),
    ],
)
def test_alpha_is_twice_the_rank_unless_said_otherwise(flags, expected):
    assert parse(flags).config().hira_alpha == expected


def test_the_learning_rate_is_loras_by_default():
    assert parse([]).training.learning_rate == RATE


def test_fields_that_are_no_lists_on_a_command_line():
    flags = ["--hira_target_modules", "all-linear", "--hira_rank_pattern", '{"q_proj": 2}']
    adapter = parse([*flags, "--hira_init_weights", "gaussian"]).config()
    assert (adapter.target_modules, adapter.rank_pattern) == ("all-linear", {"q_proj": 2})
    assert adapter.init_weights == "gaussian"
    layers = parse(["--hira_target_modules", "q_proj", "v_proj", "--hira_layers_to_transform", "0", "1"]).config()
    assert layers.layers_to_transform == [0, 1]


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--lora_r", "hira_r"),
        ("--lora-alpha=3", "hira_alpha"),
        ("--lora_target_modules", "hira_target_modules"),
        ("--lora_modules_to_save", "hira_modules_to_save"),
        ("--lora_task_type", "task_type"),
        ("--use_peft", "leave it out"),
        ("--use_dora", "DoRA"),
        ("--use_rslora", "hira_"),
        ("--lorning_rate", "learning_rate"),
        ("train.jsonl", "--help"),
    ],
)
def test_what_is_no_argument_is_refused_by_name(flag, instead):
    with pytest.raises(HiraError) as refused:
        parse([flag, "3"])
    assert flag in str(refused.value) and instead in str(refused.value)


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("max_steps: 3\n\nlora_r: 8\n", 3, "hira_r"),
        ("use_peft: true\n", 1, "leave it out"),
        ("max_steps: 3\nhira_r: many\n", 2, "invalid int value"),
        ("max_steps: 3\nhira_r: 1.5\n", 2, "invalid int value"),
        ("learning_rate: [1]\n", 1, "invalid float value"),
        ("task_type: SEQ\n", 1, "SEQ_CLS"),
        ("max_steps: 3\nmax_steps: 4\n", 2, "already"),
        ("max_steps: [\n", 2, "YAML"),
    ],
)
def test_a_mistake_in_the_file_has_its_line(config, text, line, named):
    path = config(text)
    with pytest.raises(HiraError) as refused:
        parse(["--config", path])
    assert f"{path}:{line}: " in str(refused.value) and named in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config"], "--config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--hira_alpha", "much"], "hira_alpha"),
        (["--hira_dropout", "2"], "hira_dropout"),
        (["--hira_rank_pattern", "{x"], "rank_pattern"),
        (["--hira_r", "many"], "hira_r"),
        (["--load_in_4bit", "--load_in_8bit"], "4 bit"),
        (["--bf16", "true", "--fp16", "true"], "fp16"),
    ],
)
def test_wrong_values_are_refused(flags, named):
    with pytest.raises(HiraError) as refused:
        parse(flags)
    assert named in str(refused.value)


def test_a_file_of_no_names_is_refused(config):
    with pytest.raises(HiraError, match="map names"):
        parse(["--config", config("- max_steps\n")])
    with pytest.raises(HiraError, match="paths"):
        parse(["--config", config("datasets:\n  - paths: a.jsonl\n")])


def test_help_lists_trls_and_hiras_arguments_without_loras(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--hira_r", "--packing", "--load_in_4bit", "--datasets", "--dry-run"))
    assert "--lora_" not in shown and "use_peft" not in shown
