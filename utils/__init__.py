"""Configuration, files, checkpoints, run folders: knows torch and numpy; knows no model, no dataset, no stage."""

import utils._programs  # noqa: F401  whoever runs a part of the room is told what the programs are
