"""What models, steps and devices really take: memory and seconds."""
