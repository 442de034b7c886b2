"""fineserve beside what people serve diffusion transformers with today, on the same weights."""
