"""What operators and strangers meet: a path through a fresh clone, the page, doctor, dashboards."""
