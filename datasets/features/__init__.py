"""What the patch encoder makes of patches: computed, cached, verified, read."""
