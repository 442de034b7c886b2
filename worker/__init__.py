"""The Celery workers: one queue builds models, one samples from them."""

import os

# Between two operations libgomp's threads spin for their next one: by default for so long that
# when there is none they still hold a core that the API and the broker need. Read when torch is
# loaded, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")
