"""Which sample a file of Space Ranger is of: the name is what folders and files are called beyond Space Ranger's own names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

POSITIONS = r"tissue_positions\.csv(\.gz)?|tissue_positions\.parquet|tissue_positions_list\.(csv|txt)(\.gz)?"
_INNER = r"spatial|(filtered|raw)_(feature|gene)_bc_matri(x|ces)(_h5|_mex)?"
_INNER_FOLDER = re.compile(rf"(.*_)?({_INNER})")
_OF_SPACE_RANGER = re.compile(
    rf"((^|_)(outs|binned_outputs|(square_)?\d+um|({_INNER})(\.h5)?(\.gz)?|matrix\.mtx(\.gz)?|{POSITIONS}"
    r"|tissue_positions\.parquet\.gz|scalefactors_json\.json(\.gz)?|tissue_(hires|lowres)_image\.\w+(\.gz)?))+$"
)


def sample_of(path: Path) -> tuple[str, ...]:
    """Find the name of the sample that a file is of, in parts; a file may repeat the name of its folder."""
    *folders, label = (_OF_SPACE_RANGER.sub("", part) for part in path.parts)
    names = [name for name in folders if name]
    return tuple(names if label in ("", *names[-1:]) else [*names, label])


def check_one_sample(paths: Sequence[Path], source: Path) -> None:
    """Raise ValueError if files of two samples would be paired: barcodes are the same on every slide, so nothing else tells.

    A file without the name (spatial/ beside <sample>_filtered_feature_bc_matrix.h5) is of the sample whose folder it is in.
    """
    samples = {path: sample_of(path.relative_to(source)) for path in paths}
    longest = max(samples.values(), key=len)
    named = [path for path in paths if samples[path] == longest]
    homes = {_home(path.relative_to(source)) for path in named}
    for path, sample in samples.items():
        is_unnamed = sample == longest[: len(sample)] and _home(path.relative_to(source)) in homes
        if sample != longest and not is_unnamed:
            raise ValueError(
                f"{path} and {named[0]} seem to be of two samples. Give as --source the folder of one sample; of a download "
                "whose names differ, bring the files of one sample into one folder."
            )


def _home(path: Path) -> Path:
    """The folder that holds spatial/ and filtered_feature_bc_matrix/, or the file itself."""
    return Path(*takewhile(lambda part: not _INNER_FOLDER.fullmatch(part), path.parts[:-1]))
