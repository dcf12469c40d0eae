"""Other adapters for a vLLM server that runs: it loads the model's weights again, in place."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from hira.errors import HiraError
from hira.files.merge.merged_model import PathLike, adapter_folders, adapter_weights


def push(
    adapters: PathLike | Sequence[PathLike],
    url: str,
    *,
    weights: Sequence[float] | None = None,
    any_base: bool = False,
    allow_pickle: bool = False,
    timeout: float = 3600,
) -> None:
    """Have a vLLM server with the load format "hira" serve other adapters in the place of its own.

    Requests that run are answered first, by the old adapters; later ones wait, and are answered by the new ones. The
    server checks the adapters before it changes a weight, and goes on with the old ones where it refuses them. What it
    was told at its start beside the adapters, in ``--model-loader-extra-config``, is forgotten.

    Args:
        adapters: the folder of an adapter, as the server finds it, or its name on the hub; or several.
        url: the server's, such as "http://localhost:8000"; it runs with ``VLLM_SERVER_DEV_MODE=1``.
        weights: w_i, a number for each adapter; 1 by default.
        any_base: load adapters of another model too.
        allow_pickle: read an adapter's `adapter_model.bin`, where it has no safetensors.
        timeout: the longest wait for an answer of the server, in seconds.

    Raises:
        HiraError: an argument is not what it should be, the server cannot be reached, has no such endpoints or
            several workers, or refuses the adapters.
    """
    folders = adapter_folders(adapters)
    extra: dict[str, Any] = {"adapters": [_absolute(folder) for folder in folders]}
    if weights is not None:
        extra["weights"] = adapter_weights(folders, weights)
    extra |= {name: True for name, flag in (("any_base", any_base), ("allow_pickle", allow_pickle)) if flag}
    workers = _request(url, "get_world_size", None, timeout)
    if workers != {"world_size": 1}:
        raise HiraError(
            f"{url} has several workers ({workers}). vLLM was seen to mix up their later answers after they refused "
            "adapters, so other adapters take a restart."
        )
    config = {"load_config": {"load_format": "hira", "model_loader_extra_config": extra}}
    _post(url, "pause?mode=wait", {}, timeout)
    try:
        _post(url, "collective_rpc", {"method": "update_config", "args": [config]}, timeout)
        _post(url, "collective_rpc", {"method": "reload_weights"}, timeout)
    except BaseException as refusal:
        try:
            _post(url, "resume", {}, timeout)
        except HiraError as stuck:
            raise HiraError(f"{refusal} Requests to {url} still wait: {stuck}") from refusal
        raise
    _post(url, "resume", {}, timeout)


def _absolute(adapter: PathLike) -> str:
    """A folder that is here by its whole path, since the server may have started in another one."""
    return str(Path(adapter).absolute()) if os.path.isdir(adapter) else os.fspath(adapter)


def _post(url: str, path: str, content: dict[str, Any], timeout: float) -> None:
    _request(url, path, json.dumps(content).encode(), timeout)


def _request(url: str, path: str, data: bytes | None, timeout: float) -> Any:
    """What a server answers, in JSON, if it does."""
    address = f"{url.rstrip('/')}/{path}"
    if not address.startswith(("http://", "https://")):
        raise HiraError(f"{url} is not the address of a server, such as http://localhost:8000.")
    try:
        with urlopen(Request(address, data, {"Content-Type": "application/json"}), timeout=timeout) as answer:
            return json.loads(answer.read() or b"null")
    except HTTPError as error:
        if error.code == 404:
            raise HiraError(
                f"{url} has no endpoint {path}: start vLLM with VLLM_SERVER_DEV_MODE=1, and let nobody else reach it."
            ) from error
        said = " ".join(error.read().decode(errors="replace").split())[:2000]
        raise HiraError(f"{url} refused the adapters: {said}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise HiraError(f"{url} cannot be reached at {path}: {error}.") from error
