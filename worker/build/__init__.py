"""The build task: from a queued budget to a ready model."""
