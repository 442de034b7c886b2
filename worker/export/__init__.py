"""The export task."""
