"""`python -m hira` is the `hira` command."""

from hira.cli import main

if __name__ == "__main__":
    main()
