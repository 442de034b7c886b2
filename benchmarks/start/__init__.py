"""How long a start takes, and whether the figures agree with the stopwatch."""
