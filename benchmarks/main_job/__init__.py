"""The main job, from a fresh clone to images."""
