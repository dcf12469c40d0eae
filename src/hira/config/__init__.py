"""The configuration of HiRA adapters."""

import peft  # noqa: F401  which registers hira, whose modules import those here past these names

from hira.config.hira_config import HiraConfig

__all__ = ["HiraConfig"]
