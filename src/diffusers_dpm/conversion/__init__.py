"""Checkpoints of the papers' own code, as networks of diffusers."""
