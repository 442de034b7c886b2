"""`fineserve`: the command line."""
