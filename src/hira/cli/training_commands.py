"""The command that trains an adapter: `hira finetune`."""

from __future__ import annotations

import warnings

import typer

from hira.cli.messages import errors_as_messages, quiet_imports

# the command's own parser reads the arguments, and prints the help
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def finetune(context: typer.Context) -> None:
    """Train a HiRA adapter with TRL's SFTTrainer, or a classifier of texts; --help lists TRL's and HiRA's arguments."""
    warnings.simplefilter("ignore", FutureWarning)  # TRL's own defaults have names that transformers is about to drop
    with errors_as_messages():
        from hira.training.finetune.packages import check_packages

        check_packages()
        with quiet_imports():
            from hira.training.finetune.run import finetune as run

        run(context.args)
