"""All that touches the insides of PEFT: its registries, its loading and saving, its optimizers."""

import peft  # noqa: F401  which registers hira, before any module here is half imported
