"""The `hira` command, apart from the library: importing `hira` imports PEFT, for which `--help` need not wait."""
