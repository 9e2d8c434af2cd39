"""The modes of main.py: the one place that knows model and data and loss."""
