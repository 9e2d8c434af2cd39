"""Counts and spots of a slide: read, checked, joined; and what is computed from them."""
