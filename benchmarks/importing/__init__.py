"""A trained DiT imported as the top of a family: exactness, half its depth, DiT-XL/2."""
