"""How quickly a family is trained, beside the commit before it was made quick."""
