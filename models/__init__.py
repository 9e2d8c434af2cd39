"""Models: tensors in, tensors out. `contract` says what a model is, `table` lists them all."""

import utils.text  # noqa: F401  whoever runs a part of this room is told there what the programs are
