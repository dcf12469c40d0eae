"""Adapters and models as files: what they hold, what they are turned into."""
