"""Pictures, labelled images and latents: what a network is trained on."""
