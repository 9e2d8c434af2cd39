"""Several processes at one piece of work."""
