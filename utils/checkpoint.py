"""Checkpoints: saved whole, read by PyTorch's safe loader, and found from whatever path the user gives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from utils.config import MAY_CHANGE, Config, differences, read_config
from utils.files import IF_DAMAGED, reading, require_file, write_atomically
from utils.text import brief
from utils.trained_fold import ALL_PATIENTS_FOLDER, COPIED_FOLD, FOLD_FOLDER, TrainedFold
from utils.untrusted.tensors import check_tensors, load_tensors

SCHEMA = 1
_ENDED: set[tuple[Path, int, int, int]] = set()  # checkpoints with the mark: whatever lists folds asks again
WITHOUT_LAST = (  # the remedy for a last.pt that cannot be used
    "Restore it; or move it elsewhere: a training that has ended does not need it. If it had not, move best.pt elsewhere, too: "
    "the same command (--resume) then begins this fold again, to the same result."
)
_CONTINUE = "Go on with it: the command of the training, with --resume."
_BY_NAME = "To predict with it as it is, name the file:"


def save_checkpoint(path: str | Path, fold: TrainedFold) -> None:
    """Write a trained fold atomically; the schema number is added."""
    write_atomically(path, lambda temporary: torch.save({"schema": SCHEMA, **fold.to_dict()}, temporary))


def load_checkpoint(path: str | Path, *, memory_map: bool = False) -> TrainedFold:
    """Read a trained fold; ValueError when the file is something else, of another schema, or not complete.

    memory_map: leave the weights on disk until they are used.
    """
    remedy = WITHOUT_LAST if Path(path).name == "last.pt" else IF_DAMAGED
    content = load_tensors(path, what="a checkpoint", remedy=remedy, memory_map=memory_map)
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError(
            f"{path} is not a checkpoint of this program (no 'schema' entry). A checkpoint of the published code is "
            "converted with: python main.py --mode import_reference --model_path FILE --config_name ... --out FILE"
        )
    schema = content["schema"]
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(f"{path} has checkpoint schema {brief(schema)}, this program reads {SCHEMA}.")
    with reading(path, "a checkpoint", remedy):
        return TrainedFold.from_dict(content, str(path))


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Fill `model` strictly.

    source: the file they are from, which is compared with its checksums.
    Raises ValueError for a damaged file, for numbers that are not finite, and with the first differences of the architecture.
    """
    expected, found = model.state_dict(), dict(weights)
    differences = [f"lacks {name}" for name in expected if name not in found]
    differences += [f"has unknown {name}" for name in found if name not in expected]
    differences += [
        f"{name} is {tuple(found[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape and not _sized_at_load(model, name)
    ]
    if differences:
        listed = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
        raise ValueError(
            f"{source} does not fit the model of its configuration ({len(differences)} differences): {listed}"
        )
    check_tensors(source, found)
    model.load_state_dict(found)


def _sized_at_load(model: nn.Module, name: str) -> bool:
    """Closed-form baselines hold buffers whose size depends on the training data."""
    return name in getattr(model, "sized_at_load", ())


def find_checkpoint(path: str | Path, fold: int | None = None) -> Path:
    """Find the best checkpoint meant by `path`: a run folder (with `fold`), a fold folder or a checkpoint file.

    Raises FileNotFoundError that says which there are.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"--model_path {path} does not exist; give a run folder, a fold folder or a checkpoint."
        )
    if (path / "best.pt").is_file():
        return path / "best.pt"
    found, final = fold_checkpoints(path), path / ALL_PATIENTS_FOLDER / "best.pt"
    if fold is None and not found and final.is_file():
        return final
    if fold is None and len(found) == 1:
        return next(iter(found.values()))
    if fold in found:
        return found[fold]
    if (seeds := seed_runs(path)) != [path]:
        raise FileNotFoundError(
            f"{path} is a run over several seeds ({', '.join(seed.name for seed in seeds)}). Give one of them: --model_path "
            f"{seeds[0]} (--mode compare takes the whole folder)."
        )
    raise FileNotFoundError(
        f"{path} holds no checkpoint{'' if fold is None else f' of fold {fold}'} (fold_<n>/best.pt); folds with one: "
        f"{', '.join(map(str, found)) or 'none'}. Train first with --mode train, or choose one with --fold."
    )


def chosen_checkpoints(path: str | Path, fold: int | None = None) -> tuple[list[Path], list[str]]:
    """Find the checkpoints meant by `path`: every finished fold of a run folder, or the one that a path or `fold` means.

    returns: their absolute paths, and sentences about what was left out, or taken although its training has not ended: a file
             that is named is always taken.
    Raises FileNotFoundError if there is none, ValueError if no fold that is meant has ended its training, and as `seed_runs`.
    """
    path = Path(os.path.abspath(path))  # "." has no parent; a link stays in the run that it lies in
    if path.is_file():
        return [path], _notes_on_file(path)
    seed_runs(path)
    found = fold_checkpoints(path) if fold is None and path.is_dir() and not (path / "best.pt").is_file() else {}
    if not found:
        checkpoint = find_checkpoint(path, fold)
        if not has_ended(checkpoint):
            raise ValueError(
                f"{checkpoint.parent}: the training of this fold has not ended, {checkpoint.name} is only its best epoch so "
                f"far. {_CONTINUE} {_BY_NAME} --model_path {checkpoint}"
            )
        return [checkpoint], []
    finished = [checkpoint for checkpoint in found.values() if has_ended(checkpoint)]
    left_out = [folder.name for folder in fold_folders(path).values() if folder / "best.pt" not in finished]
    if not finished:
        raise ValueError(
            f"{path}: no fold has ended its training ({', '.join(left_out)}). {_CONTINUE} {_BY_NAME} --model_path "
            f"{next(iter(found.values()))}"
        )
    note = f"Left out of {path.name}: {', '.join(left_out)}, whose training has not ended (--mode train ... --resume)."
    return finished, [note] if left_out else []


def seed_runs(run_dir: str | Path) -> list[Path]:
    """Find the runs of one method: the `seed_<s>` folders of `run_dir` in the order of s, or `run_dir` itself.

    Raises ValueError for a folder with both seeds and folds of its own, as it does not say which are meant, and where seeds
    were trained with different settings.
    """
    run_dir = Path(run_dir)
    seeds = [path for path in run_dir.glob("seed_*") if path.is_dir() and is_of_seed(path)]
    seeds.sort(key=lambda path: int(path.name[5:]))
    own = [*fold_folders(run_dir).values(), *run_dir.glob(ALL_PATIENTS_FOLDER)] if seeds else []
    if own:
        raise ValueError(
            f"{run_dir} holds both folds ({', '.join(path.name for path in own)}) and runs of seeds "
            f"({', '.join(path.name for path in seeds)}); expected one of the two. Move the seeds into a folder of their own, "
            f"or name what is meant: {seeds[0]}"
        )
    configs = [(path, config) for path in seeds if (config := config_of_run(path)) is not None]
    for path, config in configs[1:]:
        check_seed_of(*configs[0], path, config)
    return seeds or [run_dir]


def is_of_seed(folder: Path) -> bool:
    """Whether a folder has the name of one seed of a run, seed_<s>."""
    return folder.name.startswith("seed_") and folder.name[5:].isdecimal()


def check_seed_of(first: Path, expected: Config, other: Path, config: Config) -> None:
    """Raise ValueError if two runs, each with its configuration, are not two seeds of one: only the seed may differ.

    Models on all patients may each have the number of epochs that the folds of their own seed chose.
    """
    may_change = {*MAY_CHANGE, "GENERAL.seed", "GENERAL.exp_id"}
    if (first / ALL_PATIENTS_FOLDER).is_dir():
        may_change.add("EVALUATION.fixed_epochs")
    if changed := differences(expected, config, other.name, but_for=may_change):
        listed = "\n  ".join(changed)
        raise ValueError(
            f"{other} is no other seed of {first}: not only the seed differs.\n  {listed}\n"
            "Runs with other settings are another method: give them another --run_name, or a folder of their own."
        )


def runs_of(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """List the runs that paths mean: each one itself, or the seeds of a run that was repeated with several.

    Raises ValueError where one is meant twice, and as `seed_runs`.
    """
    found = [run for path in ([paths] if isinstance(paths, str | Path) else paths) for run in seed_runs(path)]
    resolved = [path.resolve() for path in found]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"--model_path names a run more than once ({', '.join(map(str, found))}); give each once.")
    return found


def checkpoints_of_runs(
    paths: str | Path | Sequence[str | Path], fold: int | None = None
) -> tuple[list[Path], list[str]]:
    """Find the checkpoints of one or several runs; see `runs_of` and `chosen_checkpoints`, for errors, too.

    Raises ValueError where two of them are the same file, which would count twice in a mean.
    """
    found = [chosen_checkpoints(path, fold) for path in runs_of(paths)]
    checkpoints = [path for paths_of_run, _ in found for path in paths_of_run]
    first: dict[Path, Path] = {}
    for path in checkpoints:
        if (same := first.setdefault(path.resolve(), path)) is not path:
            raise ValueError(
                f"--model_path means one checkpoint more than once: {path} and {same} are the same file, {path.resolve()}. "
                "Give each once, or a run folder without its folds."
            )
    return checkpoints, [note for _, notes in found for note in notes]


def check_fold_folders(checkpoints: Sequence[Path]) -> None:
    """Check that the folders fold_<n> and all_patients of each run are its folds.

    Raises ValueError for a folder that holds another fold than its name says, and where two folders of a run hold out the same
    patient or one was trained with other settings (`MAY_CHANGE` and exp_id apart) than the run's config.yaml or, without it,
    the first. A checkpoint in a folder of another name is taken as it is.
    """
    folder_of: dict[tuple[Path, str], Path] = {}
    config_of: dict[Path, tuple[Config, str]] = {}  # of a run, and where that is from
    for checkpoint in checkpoints:
        folder = Path(os.path.abspath(checkpoint)).parent
        if not FOLD_FOLDER.fullmatch(folder.name) and folder.name != ALL_PATIENTS_FOLDER:
            continue
        fold = load_checkpoint(checkpoint, memory_map=True)
        split, run = fold.split, folder.parent
        if split.folder != folder.name:
            raise ValueError(f"{checkpoint} was trained for {split.folder}, its folder is {folder.name}. {COPIED_FOLD}")
        if run not in config_of:
            of_run = config_of_run(run)
            config_of[run] = (fold.config, folder.name) if of_run is None else (of_run, "config.yaml")
        expected, source = config_of[run]
        said = f"{folder.name} was trained with"
        if changed := differences(expected, fold.config, said, but_for={*MAY_CHANGE, "GENERAL.exp_id"}):
            listed = "\n  ".join(changed)
            raise ValueError(
                f"{checkpoint} was trained with other settings than {source} of the run says:\n  {listed}\n{COPIED_FOLD} If "
                "config.yaml was changed since the run was started, restore it."
            )
        for patient in split.test_patients:
            if (other := folder_of.setdefault((run, patient), folder)) != folder:
                raise ValueError(
                    f"{other} and {folder} both hold out patient {patient}; expected each patient in one fold. {COPIED_FOLD}"
                )


def config_of_run(run: Path) -> Config | None:
    """Read the configuration that a run was started with; None where its folder holds none that can be read."""
    try:
        return read_config(run / "config.yaml")
    except (ValueError, OSError):
        return None


def has_ended(checkpoint: str | Path) -> bool:
    """Whether the training that wrote a fold's best.pt has ended; until then it holds the best epoch so far.

    Training marks it (`finished`). Of a checkpoint without the mark, from an older version, the last.pt beside it tells;
    where there is none, nothing is left to train.
    """
    path = require_file(checkpoint, "Check the path.")
    found = path.stat()
    version = (path, found.st_ino, found.st_mtime_ns, found.st_size)
    if version in _ENDED:
        return True
    fold = load_checkpoint(path, memory_map=True)
    if fold.finished:
        _ENDED.add(version)
    if fold.finished is not None:
        return fold.finished
    last = path.with_name("last.pt")
    if not last.is_file():
        return True
    fold = load_checkpoint(last, memory_map=True)
    return fold.progress.is_finished(fold.config, fold.split.score_name)


def is_complete(folder: Path) -> bool:
    """Whether a fold has ended its training and was scored; without its checkpoint the scores alone say so.

    The model on all patients is never scored.
    """
    checkpoint = folder / "best.pt"
    if folder.name == ALL_PATIENTS_FOLDER:
        return checkpoint.is_file() and has_ended(checkpoint)
    return (folder / "result.json").is_file() and (not checkpoint.is_file() or has_ended(checkpoint))


def result_folder(checkpoint: Path) -> Path:
    """Where results of a checkpoint go: the fold's folder for its best.pt; one of its own in there for any other file."""
    return checkpoint.parent if checkpoint.name == "best.pt" else checkpoint.parent / f"test_{checkpoint.stem}"


def fold_checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """{fold: path of best.pt} of a run folder, in the order of the folds, finished or not."""
    paths = {number: folder / "best.pt" for number, folder in fold_folders(run_dir).items()}
    return {number: path for number, path in paths.items() if path.is_file()}


def fold_folders(run_dir: str | Path) -> dict[int, Path]:
    """{n: folder fold_<n>} of a run folder, in the order of n.

    Raises ValueError for a number that is written otherwise (fold_01): two folders could be of one fold.
    """
    found = {}
    for folder in Path(run_dir).glob("fold_*"):
        if (match := FOLD_FOLDER.fullmatch(folder.name)) and folder.is_dir():
            number = int(match[1])
            if folder.name != f"fold_{number}":
                raise ValueError(
                    f"{folder}: the folder of fold {number} is called fold_{number}. Rename it, or move it away if that one "
                    "is there, too."
                )
            found[number] = folder
    return dict(sorted(found.items()))


def _notes_on_file(path: Path) -> list[str]:
    """What a reader of its results must know of a checkpoint that is not the finished best.pt of a fold."""
    fold = load_checkpoint(path, memory_map=True)
    if fold.optimization is not None:
        return [f"{path} holds the last epoch that was saved ({fold.epoch}), not the chosen one; taken as named."]
    if not has_ended(path):
        return [f"{path} is of a training that has not ended (best epoch so far: {fold.epoch}); taken as named."]
    return []
