"""The command for engines that serve adapters: `hira push`."""

from __future__ import annotations

from typing import Annotated

import typer

from hira.cli.file_commands import AllowPickle, AnyBase
from hira.cli.messages import errors_as_messages, print_line


def push(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="The folders of adapters, or owner/name on the hub.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="URL", help="The server, such as http://localhost:8000.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="A factor for BA, passed once for each adapter; the default is 1.")
    ] = None,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Have a vLLM server that runs serve other adapters, without a restart.

    It has to run with --load-format hira and VLLM_SERVER_DEV_MODE=1, and to find the adapters at the same paths.
    """
    with errors_as_messages():
        from hira.serving import push as pushing

        pushing.push(adapters, to, weights=weight or None, any_base=any_base, allow_pickle=allow_pickle)
        print_line(f"{to} serves {', '.join(adapters)}")
