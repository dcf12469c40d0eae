"""The `hira` command."""
