"""Real images as a judge of pictures."""
