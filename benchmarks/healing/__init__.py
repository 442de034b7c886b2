"""Factors in few bits: what healing Sigma brings back, beside other ways to round well."""
