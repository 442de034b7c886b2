"""The agreement of service and worker: records, events, artifacts, tasks and settings."""
