"""A base model on disk: its parameters, where they lie in its files, and which of them an adapter changes."""
