"""Adapters and models on disk: read with suspicion, written whole or not at all; what they hold, and conversions."""
