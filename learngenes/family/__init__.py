"""Families on disk, their previews, and made-up ones with the shapes of known networks."""
