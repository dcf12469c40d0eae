"""The arguments of `hira finetune`: TRL's own, and HiRA's as `hira_*`, from flags and a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, get_type_hints

import torch

from hira.config.hira_config import HiraConfig
from hira.errors import HiraError
from hira.training.finetune.config_file import ConfigFile
from hira.training.finetune.hira_arguments import HiraArguments, alpha_of, config_of

RATE = 2e-4  # the rate that TRL's documentation gives LoRA; its own default, 2e-5, is meant for full fine-tuning

_INSTEAD = {
    "use_peft": "leave it out: an adapter is what is trained",
    "use_dora": "leave it out: HiRA scales each entry of the weight already, and is not combined with DoRA",
    "use_rslora": "it is hira_use_rslora",
    "lora_task_type": "use task_type",
}


@dataclass
class RunArguments:
    """What is run, and how it is launched."""

    _argument_group_name = "the run"

    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = field(
        default="CAUSAL_LM", metadata={"help": "A language model, by TRL's SFTTrainer, or a classifier of texts."}
    )
    dataset_label_field: str = field(
        default="label", metadata={"help": "The column with the class of a text, for SEQ_CLS."}
    )
    measure_steps: int = field(
        default=0, metadata={"help": "Steps from one report of what each layer's update does to the next; 0 for none."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything, print what would be trained, and load no weight."}
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "ddp, fsdp2, zero2 or zero3, another of TRL's, or a file of accelerate's."}
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "Processes to launch; one for each GPU if unset."}
    )


class Arguments(NamedTuple):
    """All arguments.

    Args:
        hira, run: HiRA's, and the run's.
        script, training, model, mixture: TRL's ScriptArguments, SFTConfig, ModelConfig and DatasetMixtureConfig.
        command: the command's arguments, as they were given.
    """

    hira: Any
    run: RunArguments
    script: Any
    training: Any
    model: Any
    mixture: Any
    command: list[str]

    @property
    def classifies(self) -> bool:
        """Whether a classifier is trained, not a language model."""
        return self.run.task_type == "SEQ_CLS"

    @property
    def trusts_code(self) -> bool:
        """Whether code of the base model's may run; TRL has moved the option from ModelConfig to SFTConfig."""
        return any(getattr(group, "trust_remote_code", False) for group in (self.training, self.model))

    @property
    def alpha(self) -> float | None:
        """LoRA's alpha, or None for the paper's HiRA."""
        return alpha_of(self.hira)

    def config(self) -> HiraConfig:
        """The HiraConfig.

        Raises:
            HiraError: a field has a value that HiraConfig refuses.
        """
        return config_of(self.hira, self.run.task_type)


def parse(command: Sequence[str]) -> Arguments:
    """Read the arguments of `hira finetune`.

    Raises:
        HiraError: a flag or a key of the file is unknown, is one of LoRA's, or has a value of the wrong type; the file
            cannot be read. The message has the file's name and line.
            A field of HiraConfig has a value that it refuses.
        SystemExit: the help was asked for and printed.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    arguments = [part for given in command for part in re.split(r"(?<=^--config)=", given, maxsplit=1)]
    file = ConfigFile.of(arguments)
    model_class = _without_lora(ModelConfig)
    classes = [HiraArguments, RunArguments, ScriptArguments, SFTConfig, model_class, DatasetMixtureConfig]
    types = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    known = {item.name: types[item.name] for cls in classes for item in dataclasses.fields(cls)}

    class Parser(TrlParser):
        """TRL's, with errors that can be caught, and the file's values converted as those of flags are."""

        def error(self, message: str) -> NoReturn:
            named = re.match(r"argument --(\w+)", message)
            raise HiraError((file.place(named[1]) if named else "") + message + ".")

        def set_defaults_with_config(self, **values: Any) -> list[str]:
            checked = {name: str(v) if _is_number(known.get(name), v) else v for name, v in values.items()}
            for action in self._actions:
                if action.choices and values.get(action.dest) not in (None, *action.choices):
                    choices = ", ".join(map(str, action.choices))
                    self.error(f"argument --{action.dest}: {values[action.dest]!r} is none of {choices}")
            rest: list[str] = super().set_defaults_with_config(**checked)
            return rest

    for name in file.values:
        if name not in known and name != "env":
            raise HiraError(f"{file.place(name)}{name} is no argument of hira finetune: {_instead(name, known)}.")
    parser = Parser(classes, prog="hira finetune", allow_abbrev=False, description=__doc__)
    parser.set_defaults(learning_rate=RATE, use_cpu=not torch.accelerator.is_available())
    for given in parser.parse_known_args(file.without(arguments))[1]:
        name = given.partition("=")[0].lstrip("-").replace("-", "_")
        raise HiraError(f"{given} is no argument of hira finetune: {_instead(name, known)}.")
    try:
        hira, run, script, training, model, mixture = parser.parse_args_and_config(arguments)
        parsed = Arguments(hira, run, script, training, ModelConfig(**vars(model)), mixture, list(command))
        parsed.config()
    except (TypeError, ValueError, ImportError) as error:
        raise error if isinstance(error, HiraError) else HiraError(f"{file.path or 'the flags'}: {error}") from error
    return parsed


def _without_lora(cls: Any) -> Any:
    """TRL's ModelConfig without what configures LoRA, so that such flags are unknown, not ignored."""
    hints = get_type_hints(cls)
    kept = [item for item in dataclasses.fields(cls) if not re.match("lora_|use_peft|use_.*lora|use_dora", item.name)]
    new = dataclasses.make_dataclass("ModelArguments", [(f.name, hints[f.name], _copy(f)) for f in kept])
    setattr(new, "_argument_group_name", "the base model")  # noqa: B010 (as above)
    return new


def _copy(item: dataclasses.Field[Any]) -> Any:
    return field(default=item.default, metadata=item.metadata)


def _is_number(hint: Any, value: Any) -> bool:
    """Whether a field takes a number or a truth value, so that the parser has to check what the file has for it."""
    return value is not None and hint in (int, float, bool, int | None, float | None, bool | None)


def _instead(name: str, known: dict[str, Any]) -> str:
    """What to use in the place of an unknown argument."""
    own = "hira_" + name.removeprefix("lora_")
    if own in known:
        return f"use {own}"
    if name in _INSTEAD:
        return _INSTEAD[name]
    if name.startswith("lora_"):
        return "this field of LoRA has no counterpart in HiRA; leave it out"
    close = difflib.get_close_matches(name, known, n=1)
    return f"perhaps {close[0]} is meant" if close else "`hira finetune --help` lists what there is"
