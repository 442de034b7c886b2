"""FINE as a library: learngenes, their sizes, their training. Importing it loads no torch."""
