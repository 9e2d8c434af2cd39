"""Models: tensors in, tensors out. `contract` says what a model is, `table` lists them all."""

import utils._programs  # noqa: F401  whoever runs a part of the room is told what the programs are
