"""The configuration of HiRA adapters."""

import peft  # noqa: F401  registers hira, whose own modules import `hira_config` and not these names

from hira.config.hira_config import HiraConfig

__all__ = ["HiraConfig"]
