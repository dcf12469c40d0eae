"""Merged embeddings and heads: weights that they share, that adapters bring whole, and vocabularies of another size."""

from __future__ import annotations

import architectures
import peft
import pytest
import tied_models
import torch
from merging import assert_loads_as_merged, assert_same_tensors, config_of, hira_config, made, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from hira import HiraError, merge_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def untied() -> nn.Module:
    return architectures.llama()


def tied() -> nn.Module:
    return tied_models.llama()


@tied_models.every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_weights_are_written_once_for_all_or_apart(make, tied, targets, dtype, tmp_path):
    folders = made(tmp_path, make().to(dtype), [hira_config(*targets), hira_config(targets[0], r=3)])
    report, out = folders.merge()
    found = tensors_of(out)
    assert_same_tensors(found, tensors_of(folders.memory))
    assert report.added
    assert found.keys() == {*tensors_of(folders.base), *report.added}
    assert config_of(out) == config_of(folders.memory)
    # T5's encoder has a table of its own then, and the one of input and output embeddings stays
    assert config_of(out).get("tie_word_embeddings") == (targets == ("encoder.embed_tokens",))
    assert_loads_as_merged(folders, out)


@pytest.mark.parametrize("make", [tied_models.t5, architectures.bart], ids=["t5", "bart"])
@pytest.mark.parametrize("options", [{"target_modules": ["shared"]}, {"modules_to_save": ["shared"]}], ids=str)
def test_the_table_that_the_others_are_tied_to(make, options, tmp_path):
    """Here `save_pretrained` writes less than there is, so the models that load are compared."""
    config = peft.HiraConfig(r=2, **{"target_modules": ["fc1", "wi"], **options})
    folders = made(tmp_path, make(), [config])
    _, out = folders.merge()
    assert_loads_as_merged(folders, out)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["q_proj"]], ids=str)
@pytest.mark.parametrize("present", ["both", "head"])
def test_files_that_other_programs_wrote(present, targets, tmp_path):
    """Some write tied weights twice, or under the head's name."""
    folders = made(tmp_path, tied(), [hira_config(*targets)])

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if present == "head":
            del tensors[EMBEDDING]

    folders.rewrite(change)
    report, out = folders.merge()
    found, wanted = tensors_of(out), tensors_of(folders.memory)
    if targets == ["q_proj"]:
        assert (report.added, found.keys()) == ((), tensors_of(folders.base).keys())
    else:
        assert_same_tensors(found, wanted)
    assert config_of(out).get("tie_word_embeddings") == (targets == ["q_proj"])
    assert_loads_as_merged(folders, out)


@pytest.mark.parametrize(
    ("make", "prefix", "targets"),
    [
        (tied_models.gpt2, "transformer.", ["wte", "c_attn"]),
        (tied_models.gpt2, "transformer.", ["lm_head"]),
        (tied_models.bert, "bert.", ["word_embeddings"]),
        (architectures.bart, "model.", ["decoder.embed_tokens", "q_proj"]),
        (tied, "model.", ["embed_tokens", "q_proj"]),
        (tied, "model.", ["lm_head"]),
    ],
    ids=["gpt2", "the head of gpt2", "bert", "bart", "tied", "the head of tied"],
)
def test_files_that_name_tensors_as_the_model_without_its_head(make, prefix, targets, tmp_path):
    """As those of GPT-2 on the hub do."""
    folders = made(tmp_path, make(), [hira_config(*targets)])

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    folders.rewrite(change)
    report, out = folders.merge()
    assert report.added
    assert tensors_of(out).keys() == {*tensors_of(folders.base), *report.added}
    assert_loads_as_merged(folders, out)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
)
def test_a_base_without_the_head_that_its_embedding_is_tied_to(options, tmp_path):
    base = tied().model
    folders = made(tmp_path, base, [peft.HiraConfig(r=2, **options)], load=LlamaForCausalLM.from_pretrained)
    with pytest.raises(HiraError, match=r"may share the weight embed_tokens\.weight with it, .* is without that head"):
        folders.merge()
    folders.configure(tie_word_embeddings=False)
    folders.merge()


@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        (["q_proj"], ["embed_tokens"]),
        (["q_proj"], ["lm_head"]),
        (["q_proj"], ["embed_tokens", "lm_head"]),
        (["q_proj", "embed_tokens"], ["lm_head"]),
        (["q_proj", "lm_head"], ["embed_tokens"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [tied, untied])
def test_parameters_that_an_adapter_brings_whole(make, targets, saved, tmp_path):
    folders = made(tmp_path, make().bfloat16(), [hira_config(*targets, modules_to_save=saved)])
    report, out = folders.merge()
    found = tensors_of(out)
    assert_same_tensors(found, tensors_of(folders.memory))
    assert config_of(out) == config_of(folders.memory)
    assert {*report.replaced, *report.added} >= {EMBEDDING if name == "embed_tokens" else HEAD for name in saved}
    assert not {*report.replaced} & {*report.merged}
    assert_loads_as_merged(folders, out)


def test_buffers_that_an_adapter_brings_too(tmp_path):
    saved = ["normalization", "classifier"]
    folders = made(tmp_path, architectures.mobilenet(), [hira_config("convolution", modules_to_save=saved)])
    path = folders.adapters[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    save_file({name: t + 7 if name in counters else t for name, t in tensors.items()}, path)
    report, out = folders.merge(dtype="float16", rounding="nearest")
    found, memory = tensors_of(out), tensors_of(folders.memory)
    assert len(counters) > 10
    assert_same_tensors(
        found,
        {name: t + 7 if name.endswith("num_batches_tracked") else t.half() for name, t in memory.items()},
    )
    assert {name.removeprefix("base_model.model.") for name in counters} < {*report.replaced}


def resized(model_class: type[PreTrainedModel], rows: int = 40):
    """Loads a model and gives it a larger vocabulary, as after tokens are added."""

    def load(folder):
        model = model_class.from_pretrained(folder)
        model.resize_token_embeddings(rows)
        return model

    return load


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (untied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        (untied, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        (tied, {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
    ids=["untied, brought", "untied, adapted", "tied, brought", "tied, adapted"],
)
@pytest.mark.parametrize("rows", [40, 20])
def test_a_vocabulary_of_another_size(make, options, rows, tmp_path):
    folders = made(tmp_path, make(), [peft.HiraConfig(r=2, **options)], load=resized(LlamaForCausalLM, rows))
    report, out = folders.merge()
    found = tensors_of(out)
    assert_same_tensors(found, tensors_of(folders.memory))
    assert len(found[EMBEDDING]) == len(found[HEAD]) == rows
    assert config_of(out) == config_of(folders.memory)
    assert config_of(out)["vocab_size"] == rows
    if "modules_to_save" in options:
        assert any(f"{EMBEDDING} has {rows} rows" in note and "tokenizer" in note for note in report.notes)
    assert_loads_as_merged(folders, out)


def test_a_vocabulary_of_which_the_adapter_lacks_a_part(tmp_path):
    config = peft.HiraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    folders = made(tmp_path, untied(), [config], load=resized(LlamaForCausalLM))
    path = folders.adapters[0] / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}, path)
    with pytest.raises(HiraError, match=r"has a vocabulary of 40 instead of 32, but saves only some of .*in memory"):
        folders.merge()
    assert not (tmp_path / "out").exists()


def test_a_parameter_of_another_shape(tmp_path):
    config = peft.HiraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    folders = made(tmp_path, untied(), [config])
    path = folders.adapters[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    (name, *_) = (name for name in tensors if "down_proj" in name)
    save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, path)
    with pytest.raises(HiraError, match=r"down_proj.weight as \(16, 23\), which is \(16, 24\)"):
        folders.merge()


def test_two_adapters_that_bring_the_same_parameter(tmp_path):
    configs = [hira_config("q_proj", modules_to_save=["lm_head"])] * 2
    folders = made(tmp_path, untied(), configs)
    with pytest.raises(HiraError, match=r"adapters/a0 and .*adapters/a1 both save lm_head.weight whole"):
        folders.merge()
    first, second = (path / "adapter_model.safetensors" for path in folders.adapters)
    head = "base_model.model.lm_head.weight"
    save_file({**load_file(second), head: load_file(first)[head]}, second)
    _, out = folders.merge()
    assert torch.equal(tensors_of(out)[HEAD], load_file(first)[head])


@pytest.mark.parametrize(
    ("make", "targets"),
    [(untied, ["lm_head"]), (untied, ["embed_tokens"]), (tied, ["lm_head"])],
    ids=["head", "embedding", "tied head"],
)
def test_a_vocabulary_of_another_size_on_one_side_only(make, targets, tmp_path):
    """PEFT saves the table that is adapted and not the other, which is in the trained model alone."""
    base = make()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(40)
    peft.get_peft_model(base, hira_config(*targets)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(HiraError, match=r"has a vocabulary of 40 instead of \d+, but saves only some of .*lm_head"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_tied_parameter_that_is_brought_gets_the_dtype_of_the_model(saved, tmp_path):
    base = tied().bfloat16()
    base.save_pretrained(tmp_path / "base")
    config = hira_config("q_proj", modules_to_save=[saved])
    peft.get_peft_model(base.float(), config).save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "out").items()}
    assert dtypes["lm_head.weight"] == dtypes["model.embed_tokens.weight"] == torch.bfloat16


def test_a_parameter_that_only_another_model_can_have(tmp_path):
    base = untied()
    base.save_pretrained(tmp_path / "base")
    peft.get_peft_model(base, hira_config("q_proj")).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}, path)
    with pytest.raises(HiraError, match=r"has model.layers.7.mlp.up_proj.weight, which .* of another model"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
