"""What PEFT calls a tuner: the model, the mixed model with other tuners, and the checks of names and state dicts."""

import peft  # noqa: F401  registers hira before a module of this package is half imported
