"""The Celery workers: one queue builds models, one samples from them."""
