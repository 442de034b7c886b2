"""Uploads: received at a pace, read in a process of their own, within limits."""
