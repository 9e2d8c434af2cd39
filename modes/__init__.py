"""The modes of main.py: the one place that knows model and data and loss."""

import utils  # noqa: F401  whoever runs a part of this room is told there what the programs are
