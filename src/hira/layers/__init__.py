"""The HiRA layers, which stand in the place of a model's own."""

import peft  # noqa: F401  which registers hira, before any module here is half imported
