"""How well sizing keeps its word: `make bench-sizing`."""
