"""Configuration, files, checkpoints, run folders: knows torch and numpy; knows no model, no dataset, no stage.

Every room imports this one, so that whoever runs a module that is no program is told so: `python -m preprocess.raw.prepare`
or `python engine.py` would end in silence, as if all were done. A module that is run as a file of its folder
(`python modes/train.py`) ends before any room is found, with Python's own message.
"""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_PARTS = ("utils", "models", "datasets", "evaluation", "preprocess", "modes", "engine")
_COMMANDS = sorted((_ROOT / "preprocess").glob("[!_]*.py"))
_WRONG_USE = 2


def _started() -> Path:
    """The file that Python was started with; of no meaning where it was started otherwise."""
    if sys.argv[:1] == ["-m"]:  # until Python has found the module, whose name is only there
        name = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        return _ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve()


def _refuse_parts(path: Path) -> None:
    if not path.is_relative_to(_ROOT) or path in _COMMANDS:
        return
    names = path.relative_to(_ROOT).with_suffix("").parts
    if names[0] in _PARTS:
        sys.stderr.write(
            f"error: {'.'.join(names)} is a part of the programs and none itself: run python main.py --help, or one of "
            f"preprocess/, each with --help: {', '.join(path.name for path in _COMMANDS)}.\n"
        )
        raise SystemExit(_WRONG_USE)


_refuse_parts(_started())
