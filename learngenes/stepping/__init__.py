"""One denoising step for the rows of many models and requests at once."""
