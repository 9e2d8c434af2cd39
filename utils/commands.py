"""Commands of this program as a message names them."""

from __future__ import annotations

from pathlib import Path

from utils.config import Data, load_config


def extraction_command(
    kind: str,
    slides: str | None = None,
    encoder: str | None = None,
    *,
    data_dir: Path,
    test_name: str | None,
    patch_size: int,
    num_neighbors: int,
    patch_um: float | None = None,
    config_name: str = "CONFIG",
) -> str:
    """Spell the command that extracts features of a kind where a data folder of these sizes keeps them.

    slides: comma separated, None for all.  test_name: of an external set, None for a training set.
    Sizes are named where the configuration has others, and the configuration itself where it can be found from here,
    so its file is read: ask for the command only when something is wrong. It never replaces what is there.
    """
    try:
        data = load_config(config_name).DATA
    except (ValueError, FileNotFoundError):  # of a run made elsewhere; then only an external set may do without it
        data = None
    flags = [f"--config {config_name}"] if data or not test_name else []
    flags += [f"--mode external --test_name {test_name}" if test_name else "--mode internal"]
    flags += [f"--extract_mode {kind}", f"--data_dir {data_dir}"]
    flags += [f"--encoder {encoder}"] if encoder else []
    if patch_size != (data or Data).patch_size:
        flags.append(f"--set DATA.patch_size={patch_size}")
    if num_neighbors != (data or Data).num_neighbors:
        flags.append(f"--num_n {num_neighbors}")
    if patch_um != (data or Data).patch_um:
        flags.append(f"--match_mpp {patch_um:g}" if patch_um else "--set DATA.patch_um=null")
    flags += [f"--slides {slides}"] if slides else []
    return f"python preprocess/extract_features_uni.py {' '.join(flags)}"
