"""What --mode train is made of: data of a run, splits, folds, resuming."""
