"""The HTTP front end. Runs where there is no torch."""
