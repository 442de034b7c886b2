"""The HTTP front end, which runs where there is no torch."""
