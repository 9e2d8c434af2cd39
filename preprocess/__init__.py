"""Command-line scripts from raw public data to the documented layout and its caches; run as `python preprocess/<name>.py`."""

import utils  # noqa: F401  whoever runs a part of this room is told there what the programs are
