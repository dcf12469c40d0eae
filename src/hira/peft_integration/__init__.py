"""Everything that changes PEFT itself: its registries, its loading and saving, its optimizers."""

import peft  # noqa: F401  registers hira before a module of this package is half imported
