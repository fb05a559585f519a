"""The command line's entry point, also `python -m weightsmith`."""

from weightsmith.cli.app import main

if __name__ == "__main__":
    main()
