"""Command-line scripts from raw public data to the documented layout and its caches; run as `python preprocess/<name>.py`."""
