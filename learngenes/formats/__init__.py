"""A model for other programs, and a network of theirs as one of ours."""
