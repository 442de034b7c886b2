"""Archives that clients upload, and the images in them."""
