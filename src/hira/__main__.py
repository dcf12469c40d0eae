"""`python -m hira` is the `hira` command."""

from hira.cli.app import main

if __name__ == "__main__":
    main()
