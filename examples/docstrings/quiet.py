"""Imported before all else: leaves out what other libraries log and warn of, such as quantisers when PEFT imports them."""

import logging
import warnings

logging.disable(logging.WARNING)
warnings.simplefilter("ignore", FutureWarning)
