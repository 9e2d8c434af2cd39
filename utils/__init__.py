"""Configuration, files, checkpoints, run folders: knows torch and numpy; knows no model, no dataset, no stage."""
