"""The command line, and the embedded default that `make up` starts."""
