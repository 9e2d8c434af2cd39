"""Preparation, extraction, training and prediction that are killed, that run out of disk, or that run twice at once."""

from __future__ import annotations

import importlib
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess.simulate_demo import simulate
from tests.modes.conftest import CONFIG
from tests.soak.jobs import Job, contents, differences, kill_chain, run_job, start_job
from tests.space_ranger import write_outs

Say = Callable[[str], object]
WRONG_USE, NAMES = 2, ("preparation", "sections", "extraction", "training", "prediction")
_GENES = ["TP53", "ERBB2", "CD3E", "KRT5"]
# The programs, and what they import when they come to it: two to five times the time of what they then do.
_PROGRAMS = ("main", "preprocess.extract_features_uni", "preprocess.prepare_visium", "modes.train", "modes.predict")
_LATE = ("evaluation.report.explorer_page", "timm", "torch._dynamo", "torch.utils.tensorboard")


@dataclass(frozen=True)
class Program:
    """What is started, what goes on with it, where it writes, and what lies there before it starts."""

    name: str
    start: Job
    again: Job
    folder: Path
    before: Path | None

    def clean(self) -> None:
        """Bring the folder back to how it was before the first start."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.before is None:
            self.folder.mkdir()
        else:
            shutil.copytree(self.before, self.folder)


def programs(folder: Path, names: Sequence[str] = NAMES) -> list[Program]:
    """Preparation, extraction, training and prediction of a tiny set; the data of the training are made by the extraction."""
    for module in (*_PROGRAMS, *_LATE):  # now, and not in every process that is forked
        importlib.import_module(module)
    is_trained = bool({"extraction", "training", "prediction"} & set(names))
    if is_trained:
        simulate(folder / "raw", patients="ABC", slides_per_patient=1, grid=(4, 4), num_genes=24, external=False)
    config, device = folder / "tiny.yaml", ("--device", "cpu", "--num_workers", "1")
    config.write_text(CONFIG)
    extraction = Job("preprocess.extract_features_uni", ("--config", str(config), "--extract_mode", "all", *device))
    extract = extraction.with_flags("--views", "1", "--data_dir", str(folder / "extracted"))
    if {"training", "prediction"} & set(names):
        shutil.copytree(folder / "raw", folder / "data")
        _must(extraction.with_flags("--views", "1", "--data_dir", str(folder / "data")), folder)
    training = Job("main", ("--mode", "train", "--config_name", str(config), *device[:2]))
    paths = ("--data_dir", str(folder / "data"), "--log_path", str(folder / "logs"), "--run_name", "run")
    train = training.with_flags(*paths, "--folds", "0,1", "--checkpoint_seconds", "0", "--no_report")
    picture = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    outs = write_outs(folder / "outs", picture, _GENES)
    (folder / "panel.txt").write_text("".join(f"{gene}\n" for gene in _GENES))
    source = ("--source", str(outs.folder), "--image", str(outs.image), "--name", "v")
    prepare = Job("preprocess.prepare_visium", (*source, "--panel", str(folder / "panel.txt")))
    prepare = prepare.with_flags("--data_dir", str(folder / "prepared"))
    predict = Job("main", ("--mode", "predict", "--model_path", str(folder / "models" / "tiny" / "run"), *device[:2]))
    if "prediction" in names:
        image = str(next((folder / "data").rglob("A1.jpg")))
        predict = predict.with_flags("--image", image, "--out", str(folder / "predicted" / "A1.h5ad"))
        of_one = training.with_flags("--log_path", str(folder / "models"), "--folds", "0", "--no_report")
        _must(of_one.with_flags(*paths[:2], *paths[4:]), folder)
    rows = ["sample,patient,outs,image"]
    for name in "vw":
        outs = write_outs(folder / name / "outs", picture, _GENES, seed=ord(name))
        rows.append(f"{name},P{name},{outs.folder},{outs.image}")
        Image.fromarray(picture[:, :: 1 if name == "v" else -1]).save(outs.image)
    (folder / "samples.csv").write_text("\n".join(rows) + "\n")
    several = Job("preprocess.prepare_visium", ("--samples", str(folder / "samples.csv"), "--name", "own"))
    several = several.with_flags("--data_dir", str(folder / "sections"))
    found = [
        Program("preparation", prepare, prepare, folder / "prepared", None),
        Program("sections", several, several, folder / "sections", None),
        Program("extraction", extract, extract, folder / "extracted", folder / "raw"),
        Program("training", train, train.with_flags("--resume"), folder / "logs", None),
        Program("prediction", predict, predict.with_flags("--overwrite"), folder / "predicted", None),
    ]
    return [program for program in found if program.name in names]


def _must(job: Job, folder: Path) -> None:
    ended = run_job(job, folder / "none")
    assert ended.status == 0, ended.output


def kills(
    folder: Path,
    seed: int,
    chains: int,
    events: int,
    say: Say,
    names: Sequence[str] = NAMES,
    *,
    in_a_row: bool = False,
) -> list[str]:
    """Kill at file events, and at random moments in chains of up to four; what is left must be as if undisturbed.

    events: at how many, of which every fourth and the last gets SIGTERM; 0 for all of them, one by one.
    in_a_row: instead SIGTERM after a quarter of the events, and SIGKILL after as many of what goes on with it.
    """
    findings = []
    for program in programs(folder, names):
        program.clean()
        whole = run_job(program.start, program.folder)
        assert whole.status == 0, whole.output
        expected = contents(program.folder)
        plans = _plans(whole.events, events, in_a_row)
        planned = len(plans)
        draw = random.Random(f"{seed} {program.name}")
        for chain in range(chains):
            by = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            moments = [draw.uniform(0, whole.seconds) for _ in range(draw.randint(1, 4))]
            words = f"chain {chain}, {by.name} after {', '.join(f'{moment:.2f}' for moment in moments)} s"
            plans.append(([{"after": moment, "by": by} for moment in moments], words))
        found = []
        for plan, words in plans:
            program.clean()
            title = f"{program.name}, {words}"
            new = kill_chain(program.start, program.again, program.folder, expected, plan, title)
            found += new
            for finding in new:  # at once: hours may follow
                say(f"* {finding}")
        say(
            f"{program.name}: {whole.events} file events, {planned} trials at them, {chains} chains, {len(found)} findings"
        )
        findings += found
    return findings


def _plans(num_events: int, chosen: int, in_a_row: bool) -> list[tuple[list[dict], str]]:
    """Kills at file events, in words too; see `kills`."""
    if in_a_row:
        after = num_events // 4  # what is begun is ended on SIGTERM, and as many must be left
        both = [{"kill_at": after, "by": by} for by in (signal.SIGTERM, signal.SIGKILL)]
        return [(both, f"SIGTERM and SIGKILL after {after} of {num_events} file events each")]
    at = (
        range(1, num_events + 1)
        if chosen == 0
        else np.linspace(1, num_events, chosen + 2)[1:-1].round().astype(int).tolist()
    )
    plans = []
    for number, event in enumerate(at, start=1):
        by = signal.SIGTERM if number % 4 == 0 or number == len(at) else signal.SIGKILL
        plans.append(([{"kill_at": event, "by": by}], f"{by.name} at file event {event} of {num_events}"))
    return plans


def disk(folder: Path, say: Say) -> list[str]:
    """A disk with hardly any room, and a read-only one: status 2 and the reason, nothing left over; then it goes on."""
    findings = []
    for program in programs(folder):
        program.clean()
        assert run_job(program.start, program.folder).status == 0
        expected = contents(program.folder)
        program.clean()
        used = sum(path.stat().st_size + 4096 for path in program.folder.rglob("*"))
        for words, option in (("space", f"size={used + (1 << 16)}"), ("read-only", "size=1g")):
            program.clean()
            shutil.rmtree(program.folder)
            program.folder.mkdir()
            if _mounted(program.folder, option) is False:
                say("skipped: only root may mount a small file system")
                return findings
            if program.before is not None:
                shutil.copytree(program.before, program.folder, dirs_exist_ok=True)
            try:
                findings += _on_a_bad_disk(program, words, expected)
            finally:
                subprocess.run(["umount", program.folder], check=True)
        say(f"{program.name}: a full and a read-only disk, {len(findings)} findings so far")
    return findings


def _mounted(folder: Path, option: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def _on_a_bad_disk(program: Program, words: str, expected: dict[str, str]) -> list[str]:
    title, before = f"{program.name}, {words}", contents(program.folder)
    if words == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", program.folder], check=True)
    ended = run_job(program.start, program.folder)
    findings = []
    is_said = words in ended.output or (words == "space" and "free there" in ended.output)
    if ended.status != WRONG_USE or not is_said or "Traceback" in ended.output:
        findings.append(f"{title}: ended with {ended.status}: {ended.output[-300:]}")
    hidden = [name for name in contents(program.folder) if Path(name).name.startswith(".") and name not in expected]
    findings += [f"{title}: {name} is left over" for name in hidden if name not in before]
    subprocess.run(["mount", "-o", "remount,rw,size=1g", program.folder], check=True)
    ended = run_job(program.again, program.folder)
    if ended.status != 0:
        return [*findings, f"{title}: the repeated command ended with {ended.status}: {ended.output[-300:]}"]
    return [*findings, *(f"{title}: {line}" for line in differences(expected, contents(program.folder)))]


def races(folder: Path, say: Say) -> list[str]:
    """The same command twice at once: each ends well or is refused, and in the end all is as if there had been one."""
    findings = []
    for program in programs(folder):
        program.clean()
        assert run_job(program.start, program.folder).status == 0
        expected = contents(program.folder)
        for first, second in ((program.start, program.start), (program.again, program.again)):
            program.clean()
            both = [start_job(job, program.folder) for job in (first, second)]
            ends = [job.wait() for job in both]
            title = f"{program.name} twice at once (ended with {ends})"
            if min(ends) < 0 or max(ends) > WRONG_USE or 1 in ends or 0 not in ends:
                findings.append(f"{title}: {' / '.join(job.output()[-300:] for job in both)}")
            ended = run_job(program.again, program.folder)
            if ended.status != 0:
                findings.append(f"{title}: the repeated command ended with {ended.status}: {ended.output[-300:]}")
            findings += [f"{title}: {line}" for line in differences(expected, contents(program.folder))]
        say(f"{program.name}: twice at once, {len(findings)} findings so far")
    return findings
