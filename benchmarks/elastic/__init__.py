"""Elastic requests under load: `python -m benchmarks.elastic`."""
