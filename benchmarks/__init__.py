"""Measurements of the fast paths against obvious slow versions of the same; each script prints a table and writes JSON."""
