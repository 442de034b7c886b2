"""HTTP routes, one module for each resource."""

from . import datasets, families, generations, metrics, models, openai, page, plan, session, status

ROUTES = (plan, models, datasets, generations, openai, families, status, session, metrics, page)
"""Modules of routes, in the order of /docs."""
