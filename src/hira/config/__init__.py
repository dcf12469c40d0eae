"""The configuration of HiRA adapters."""

import peft  # noqa: F401  which registers hira, whose modules import those here past these names

from hira.config.hira_config import (
    HiraConfig,
    InitWeights,
    check_adapter_file,
    check_config,
    check_init_weights,
    check_rank,
    rank_of,
)

__all__ = [
    "HiraConfig",
    "InitWeights",
    "check_adapter_file",
    "check_config",
    "check_init_weights",
    "check_rank",
    "rank_of",
]
