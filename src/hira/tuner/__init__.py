"""What PEFT calls a tuner: the configuration, the model, and the model that mixes HiRA with other tuners."""

import peft  # noqa: F401  which registers hira, before any module here is half imported
