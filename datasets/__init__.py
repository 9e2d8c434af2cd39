"""Slides, counts and images in, checked arrays and batches out: knows utils; knows no model and no device."""

import utils  # noqa: F401  whoever runs a part of this room is told there what the programs are
