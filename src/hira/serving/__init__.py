"""Serving engines that load a base model with HiRA adapters."""
