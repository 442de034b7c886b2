"""What service and worker must agree on: records, events, artifacts, tasks and settings."""
