"""The command line: one file per verb, each a click command called `command`."""
