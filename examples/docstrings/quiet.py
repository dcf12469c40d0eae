"""Imported before all else: leaves out what other libraries log or warn of, quantisers that PEFT imports among them."""

import logging
import warnings

logging.disable(logging.WARNING)
warnings.simplefilter("ignore", FutureWarning)
