"""The base model of a run: its configuration, its tokenizer, and how it is loaded."""

from __future__ import annotations

from typing import Any

from hira.errors import HiraError
from hira.training.finetune.arguments import Arguments
from hira.training.finetune.dataset import Data


def base_config(arguments: Arguments) -> Any:
    """The base model's configuration.

    Raises:
        HiraError: no model is named, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    name = arguments.model.model_name_or_path
    if not name:
        raise HiraError("no base model is named: use --model_name_or_path FOLDER, or owner/name on the hub.")
    revision = arguments.model.model_revision
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=arguments.trusts_code)
    except (OSError, ValueError) as error:
        raise HiraError(f"the base model {name} cannot be read: {error}") from error


def auto_class(arguments: Arguments) -> Any:
    """The class of transformers that makes a model for the task."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if arguments.classifies else AutoModelForCausalLM


def model_options(arguments: Arguments) -> dict[str, Any]:
    """What `from_pretrained` gets."""
    from trl import get_quantization_config

    model, training = arguments.model, arguments.training
    options = {
        "revision": model.model_revision,
        "trust_remote_code": arguments.trusts_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    if (quantised := get_quantization_config(model)) is not None:
        options["quantization_config"] = quantised
    return {**options, **(training.model_init_kwargs or {})}


def tokenizer_of(arguments: Arguments, data: Data) -> Any:
    """The base model's tokenizer, or its processor.

    Raises:
        HiraError: it cannot be read, has neither a padding nor an end token, or lacks a chat template for messages.
    """
    from transformers import AutoProcessor, AutoTokenizer

    name, revision = arguments.model.model_name_or_path, arguments.model.model_revision
    loader = AutoTokenizer if arguments.classifies else AutoProcessor  # as SFTTrainer does
    try:
        found = loader.from_pretrained(name, revision=revision, trust_remote_code=arguments.trusts_code)
    except (OSError, ValueError, KeyError) as error:
        raise HiraError(f"the tokenizer of {name} cannot be read: {error}") from error
    tokenizer = getattr(found, "tokenizer", found)
    end = arguments.training.eos_token or tokenizer.eos_token
    if tokenizer.pad_token is None and end is None:
        raise HiraError(f"the tokenizer of {name} has no padding token and no end token; name one by --eos_token.")
    row = next(iter(data.train))
    if not arguments.classifies:
        chats = any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt"))
        if chats and not found.chat_template and not arguments.training.chat_template_path:
            raise HiraError(
                f"the data has messages, and the tokenizer of {name} no chat template; name one by "
                "--chat_template_path."
            )
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = end
    return found
