"""From a queued budget to a ready model: plan, retrain, verify, publish."""
