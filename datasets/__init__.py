"""Slides, counts and images in, checked arrays and batches out: knows utils; knows no model and no device."""
