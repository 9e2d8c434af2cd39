"""Formats read without trusting the file: neither its code nor its pointers nor its sizes."""
