"""Sizing: cost model, quality, device profile and solver; importable where there is no torch."""
