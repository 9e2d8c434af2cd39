"""The modes of main.py: the one place that knows model and data and loss."""

import utils._programs  # noqa: F401  whoever runs a part of the room is told what the programs are
