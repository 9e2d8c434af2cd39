"""Slides, counts and images in, checked arrays and batches out: knows utils; knows no model and no device."""

import utils._programs  # noqa: F401  whoever runs a part of the room is told what the programs are
