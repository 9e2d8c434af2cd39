"""Command-line scripts from raw public data to the documented layout and its caches; run as `python preprocess/<name>.py`."""

import utils._programs  # noqa: F401  whoever runs a part of the room is told what the programs are
