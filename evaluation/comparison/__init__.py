"""Runs beside each other: paired over patients, written as tables and a page."""
