"""A run in several processes, by accelerate's launcher and TRL's configurations for it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from hira.errors import HiraError
from hira.training.finetune.arguments import Arguments

_ALIASES = {"ddp": "multi_gpu"}
MODULE = "hira.training.finetune"


def needs_launcher(arguments: Arguments) -> bool:
    """Whether accelerate has to launch the run: in several processes, by default one for each GPU, or as is said."""
    count = arguments.run.num_processes or torch.accelerator.device_count()
    return arguments.run.accelerate_config is not None or count > 1


def launch(arguments: Arguments) -> None:
    """Run the module in each of the processes, with the command's own arguments, and wait for their end.

    Raises:
        HiraError: there is no such configuration, the number of processes is not known, or a process failed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = [*launch_flags(arguments), "--module", MODULE, *arguments.command]
    try:
        launch_command(launch_command_parser().parse_args(flags))
    except ChildFailedError as error:
        raise HiraError("a process failed; what it printed is above.") from error
    except (ValueError, ImportError) as error:
        raise HiraError(f"accelerate cannot launch this run: {error}") from error


def launch_flags(arguments: Arguments) -> list[str]:
    """The flags of `accelerate launch`.

    Raises:
        HiraError: there is no such configuration, or the number of processes is not known.
    """
    run, training = arguments.run, arguments.training
    name = run.accelerate_config or "ddp"
    flags = ["--mixed_precision", "bf16" if training.bf16 else "fp16" if training.fp16 else "no"]
    # hira_alpha reads the base model's weights in each process, which this would load in one alone
    flags += ["--fsdp_cpu_ram_efficient_loading", "false"]
    if Path(name).is_file():
        flags += ["--config_file", name]
        return flags if run.num_processes is None else [*flags, "--num_processes", str(run.num_processes)]
    folder = files("trl") / "accelerate_configs"
    file = folder / f"{_ALIASES.get(name, name)}.yaml"
    if not file.is_file():
        known = sorted({*_ALIASES, *(Path(each.name).stem for each in folder.iterdir() if each.name.endswith(".yaml"))})
        raise HiraError(f"accelerate_config {name!r} is no file, and none of {', '.join(known)}.")
    if name.startswith("fsdp") and not torch.accelerator.is_available():
        raise HiraError(f"{name} needs an accelerator: on a CPU accelerate would run DDP in its place. Use ddp.")
    count = run.num_processes or torch.accelerator.device_count()
    if not count:
        raise HiraError(f"no GPU is here to count, so {name} needs --num_processes.")
    # port 0 is any that is free
    return [*flags, "--config_file", str(file), "--num_processes", str(count), "--main_process_port", "0"]
