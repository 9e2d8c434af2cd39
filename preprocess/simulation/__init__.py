"""The simulated demo: tissue layout, its H&E-like picture, and the counts that depend on it."""
