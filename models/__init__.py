"""Models: tensors in, tensors out. `contract` says what a model is, `table` lists them all."""
