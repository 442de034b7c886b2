"""Pre-training, Sigma retraining, refinement, condensation, calibration."""
