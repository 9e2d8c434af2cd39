"""Regions of an image of any supported kind, patch windows, tissue."""
