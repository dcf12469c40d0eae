"""Merging by names: files laid out otherwise than the modules, other heads, unknown architectures."""

from __future__ import annotations

import json
import shutil
from typing import Any

import architectures
import peft
import pytest
import tied_models
import transformers as hf
from merging import assert_loads_as_merged, assert_same_tensors, config_of, hira_config, made, save, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter

from hira import HiraError
from hira.files.merge.merge_checkpoint import merge_checkpoint

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
TEXT = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 24, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IN_MEMORY = r"Merge in memory instead.*merge_and_unload.*save_original_format=False"


def llava() -> nn.Module:
    text, vision = hf.LlamaConfig(**TEXT), hf.CLIPVisionConfig(**VISION)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3))


def paligemma() -> nn.Module:
    text, vision = hf.GemmaConfig(**TEXT, head_dim=8), hf.SiglipVisionConfig(**VISION)
    return hf.PaliGemmaForConditionalGeneration(hf.PaliGemmaConfig(text_config=text, vision_config=vision))


def olmo_hybrid() -> nn.Module:
    """Its three convolutions in the files are one in the model."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    heads |= {"linear_key_head_dim": 4, "linear_value_head_dim": 4}
    config = hf.OlmoHybridConfig(**TEXT, **heads, layer_types=["linear_attention", "full_attention"])
    return hf.OlmoHybridForCausalLM(config)


def nomic_bert() -> nn.Module:
    """One tensor in the files is query, key and value."""
    return hf.NomicBertModel(hf.NomicBertConfig(**SIZES, intermediate_size=24))


def qwen3_vl_moe() -> nn.Module:
    """The files have each expert's matrix transposed."""
    text = {**TEXT, "moe_intermediate_size": 8, "num_experts": 3, "head_dim": 8}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return hf.Qwen3VLMoeForConditionalGeneration(config)


def gpt_oss() -> nn.Module:
    return hf.GptOssForCausalLM(hf.GptOssConfig(**TEXT, num_local_experts=3, head_dim=8))


def qwen3_moe() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, moe_intermediate_size=8, num_experts=3))


def bert_model() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SIZES, intermediate_size=24))


@pytest.mark.parametrize(
    ("make", "targets", "parameters"),
    [
        (llava, ["q_proj", "down_proj", "patch_embedding", "embed_tokens", "lm_head"], None),
        (olmo_hybrid, ["q_proj", "o_proj", "down_proj", "embed_tokens"], None),
        (nomic_bert, ["o_proj", "down_proj", "word_embeddings"], None),
        (qwen3_vl_moe, ["q_proj", "qkv", "linear_fc1"], None),
        # the parameter of a module that is a target too
        (gpt_oss, ["o_proj"], ["mlp.router.weight", *EXPERTS]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_files_that_name_or_stack_tensors_otherwise_than_the_modules(make, targets, parameters, tmp_path):
    folders = made(tmp_path, make(), [hira_config(*targets, target_parameters=parameters)], shard=3000)
    report, out = folders.merge()
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))
    assert len(report.merged) >= sum(key.endswith("A.a0") for key in folders.adapted.state_dict())
    assert_loads_as_merged(folders, out)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_head_whose_file_would_name_it_otherwise(target, tmp_path):
    """`save_pretrained` writes `language_model.lm_head.weight`, of which the one that is added here loads the same."""
    folders = made(tmp_path, paligemma(), [hira_config(target)])
    report, out = folders.merge()
    assert report.added == ("lm_head.weight",)
    assert_loads_as_merged(folders, out)


@pytest.mark.parametrize(
    ("make", "targets", "parameters", "found"),
    [
        (
            qwen3_vl_moe,
            ["q_proj"],
            EXPERTS,
            r"store model\.language_model\.layers\.0\.mlp\.experts\.\w+ in another layout",
        ),
        (olmo_hybrid, ["conv1d"], None, r"store model\.layers\.0\.linear_attn\.conv1d\.weight in another layout"),
        (nomic_bert, ["q_proj"], None, r"store layers\.0\.self_attn\.q_proj\.weight in another layout"),
        (nomic_bert, ["k_proj", "v_proj"], None, r"store layers\.0\.self_attn\.k_proj\.weight in another layout"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_files_that_permute_or_split_are_refused_and_merge_as_the_message_says(
    make, targets, parameters, found, tmp_path
):
    folders = made(tmp_path, make(), [hira_config(*targets, target_parameters=parameters)])
    with pytest.raises(HiraError, match=f"{found}.*{IN_MEMORY}"):
        folders.merge()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", ["q_proj", "k_proj"])
def test_parameters_brought_whole_that_such_files_have_in_parts(saved, tmp_path):
    folders = made(tmp_path, nomic_bert(), [hira_config("o_proj", modules_to_save=[saved])])
    with pytest.raises(HiraError, match=rf"store layers\.0\.self_attn\.{saved}\.weight in another layout.*{IN_MEMORY}"):
        folders.merge()


@pytest.mark.parametrize("step", [Concatenate(dim=2), Transpose(1, 2), Chunk(dim=0)], ids=lambda s: type(s).__name__)
def test_experts_that_a_later_transformers_joins_otherwise(step, tmp_path, monkeypatch):
    folders = made(tmp_path, qwen3_moe(), [hira_config("q_proj", target_parameters=EXPERTS)])

    known = conversion_mapping.get_model_conversion_mapping

    def mapping(model: nn.Module, **options: Any) -> list[Any]:
        found = known(model, **options)
        for converter in found:
            if isinstance(converter, WeightConverter):
                converter.operations = [converter.operations[0], step]
        return found

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", mapping)
    with pytest.raises(HiraError, match=rf"mlp\.experts\.\w+ in another layout.*{IN_MEMORY}"):
        folders.merge()


def test_the_way_out_of_such_files(tmp_path):
    """The base model, saved with the modules' names, merges."""
    folders = made(tmp_path, nomic_bert(), [hira_config("q_proj", "k_proj")])
    plain = tmp_path / "plain"
    type(folders.adapted.base_model.model).from_pretrained(folders.base).save_pretrained(
        plain, save_original_format=False
    )
    merge_checkpoint(plain, folders.adapters, tmp_path / "out")
    assert_loads_as_merged(folders, tmp_path / "out")


# Another head than the base model's


@pytest.mark.parametrize(
    ("make", "trained", "targets"),
    [
        (architectures.llama, hf.LlamaForSequenceClassification, ["q_proj", "embed_tokens"]),
        (bert_model, hf.BertForSequenceClassification, ["query", "word_embeddings"]),
        (architectures.bert, hf.BertModel, ["query", "word_embeddings"]),
        (architectures.gpt2, hf.GPT2Model, ["c_attn", "c_proj"]),
        (bert_model, hf.BertForTokenClassification, ["value"]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_base_has_another_head_than_the_adapted_model(make, trained, targets, tmp_path):
    options = {} if trained in (hf.BertModel, hf.GPT2Model) else {"task_type": "SEQ_CLS"}
    if trained is hf.BertForTokenClassification:
        options["task_type"] = "TOKEN_CLS"
    folders = made(tmp_path, make(), [hira_config(*targets, **options)], load=trained.from_pretrained, shard=3000)
    report, out = folders.merge()
    assert bool(report.added) == bool(options)
    assert [note.split()[0] for note in report.notes if "is new" in note] == list(report.added)
    if options:  # what the adapted model does not have comes along, as the old head
        found, wanted = tensors_of(out), tensors_of(folders.memory)
        assert_same_tensors({name: found[name] for name in wanted}, wanted)
    assert_loads_as_merged(folders, out)


def test_adapters_of_models_with_different_heads(tmp_path):
    plain = made(tmp_path / "plain", bert_model(), [hira_config("query")])
    config = hira_config("query", task_type="SEQ_CLS")
    other = made(tmp_path / "other", bert_model(), [config], load=hf.BertForSequenceClassification.from_pretrained)
    with pytest.raises(HiraError, match=f"models that name their parameters differently.*{IN_MEMORY}"):
        merge_checkpoint(plain.base, [*plain.adapters, *other.adapters], tmp_path / "out", any_base=True)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("targets", [["c_proj"], ["c_proj", "lm_head"], ["c_proj", "c_attn"]], ids=str)
def test_square_matrices_are_taken_as_the_architecture_stores_them(targets, said, tmp_path):
    """What the config says is what its user guessed."""
    folders = made(tmp_path, architectures.gpt2(), [hira_config(*targets, fan_in_fan_out=said)])
    assert json.loads((folders.adapters[0] / "adapter_config.json").read_text())["fan_in_fan_out"] is said
    _, out = folders.merge()
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))


def test_a_square_matrix_that_is_adapted_as_a_parameter(tmp_path):
    """Then it is taken as it is stored, whatever its module would do with it."""
    config = hira_config("c_attn", target_parameters=["attn.c_proj.weight"])
    folders = made(tmp_path, architectures.gpt2(), [config])
    _, out = folders.merge()
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))


# Architectures that transformers does not have

UNKNOWN = [{"model_type": "mystery"}, {"auto_map": {"AutoModelForCausalLM": "modeling.Mystery"}}]


@pytest.mark.parametrize("unknown", UNKNOWN, ids=str)
def test_an_unknown_architecture_merges_by_names(unknown, tmp_path):
    folders = made(tmp_path, architectures.llama(), [hira_config("q_proj", "embed_tokens", "lm_head")], shard=3000)
    folders.configure(**unknown, tie_word_embeddings=False)
    _, out = folders.merge()
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))
    assert config_of(out) == config_of(folders.base)


@pytest.mark.parametrize("ties", [True, None])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("unknown", UNKNOWN, ids=str)
def test_embeddings_of_an_unknown_architecture_that_may_be_tied_are_refused(unknown, options, ties, tmp_path):
    folders = made(tmp_path, tied_models.llama(), [peft.HiraConfig(r=2, **options)])
    folders.configure(**unknown, tie_word_embeddings=ties)
    folders.rewrite(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    with pytest.raises(HiraError, match=rf"(embed_tokens|lm_head)\.weight may share its weight.*{IN_MEMORY}"):
        folders.merge()


def test_square_matrices_of_an_unknown_architecture(tmp_path):
    folders = made(tmp_path, architectures.gpt2(), [hira_config("c_proj", "c_attn")])
    folders.configure(model_type="mystery")
    with pytest.raises(HiraError, match=rf"h\.0\.attn\.c_proj\.weight \(16, 16\) .* cannot be told.*{IN_MEMORY}"):
        folders.merge()
    path = folders.adapters[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    _, out = folders.merge()
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))
    second = tmp_path / "second"
    shutil.copytree(folders.adapters[0], second)
    tensors = load_file(second / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if ".attn.c_proj." in k}, second / "adapter_model.safetensors")
    (second / "adapter_config.json").write_text(
        path.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false')
    )
    with pytest.raises(HiraError, match=r"second says fan_in_fan_out False"):
        merge_checkpoint(folders.base, [*folders.adapters, second], out, overwrite=True)


@pytest.mark.parametrize("other", [architectures.bert, tied_models.llama, architectures.gpt2])
def test_an_adapter_of_another_model(other, tmp_path):
    folders = made(tmp_path, architectures.llama(), [hira_config("q_proj")])
    shutil.rmtree(folders.base)
    save(other(), folders.base)
    absent = (
        r"has no parameters for model\.layers\.(0|1)\.self_attn\.q_proj.* of the adapter .*adapters/a0.*another model"
    )
    shapes = (
        r"model\.layers\.0\.self_attn\.q_proj in .*a0, A \(2, 16\) and B \(16, 2\), do not fit .* \(8, 8\).*another"
    )
    with pytest.raises(HiraError, match=f"{absent}|{shapes}"):
        folders.merge()
