"""What a training tells while it runs: a line an epoch, curves."""
