"""What training refuses the doctor has found: every bad input goes through both, as a user would give it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from datasets.features.cache import read_features
from datasets.features.identity import DATASET_OF_KIND
from tests.caches import as_earlier, edited
from tests.checkpoints import edit
from tests.command_line import Left, call_main
from tests.modes.test_bad_input import BAD_TABLES, Place, outside, place
from tests.reliability.test_locks import HOLD, ROOT
from tests.reliability.test_pickles import CRAFTED
from utils.runs import read_versions

__all__ = ["place"]
pytestmark = pytest.mark.usefixtures("_takes_shortcuts")

Spoil = Callable[[Place], list[object] | None]
KINDS = ("target", "neighbor", "token")


def table(what: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Spoil:
    """Change the "counts" or the "spots" of B1."""
    return lambda place: getattr(place, what)(change)


def counts(change: Callable[[pd.DataFrame], pd.DataFrame], slides: str = "A1 B1 C1") -> Spoil:
    """Change the counts where they lie, with their types."""

    def spoil(place: Place) -> None:
        for slide in slides.split():
            path = place.layout.counts_path(slide)
            change(pd.read_parquet(path)).to_parquet(path)

    return spoil


def with_ids(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_axis([f"ENSG{i:011d}" for i in range(table.shape[1])], axis=1)


def tables_beside(slide: str, *suffixes: str, is_kept: bool = False) -> Spoil:
    """Other tables of the counts of a slide, in place of its own or beside it."""

    def spoil(place: Place) -> None:
        path = place.layout.counts_path(slide)
        for suffix in suffixes:
            pd.read_parquet(path).to_csv(path.with_name(f"{slide}{suffix}"), sep="," if suffix == ".csv" else "\t")
        if not is_kept:
            path.unlink()

    return spoil


def number(kind: str, value: float, *, is_earlier: bool = False, is_sealed: bool = False) -> Spoil:
    """Change a number in a cache of C1.

    is_earlier: of an earlier version, without checksums.  is_sealed: as if the program had written it so.
    """

    def spoil(place: Place) -> None:
        path = place.layout.cache_path(kind, "C1")
        if is_earlier:
            as_earlier(path)
        with edited(path) if is_sealed else h5py.File(path, "r+") as file:
            numbers = file[DATASET_OF_KIND[kind]]
            numbers[(5, *(0,) * (numbers.ndim - 1))] = value

    return spoil


def attribute(kind: str, name: str, value: object) -> Spoil:
    def spoil(place: Place) -> None:
        with edited(place.layout.cache_path(kind, "B1")) as file:
            file.attrs[name] = value

    return spoil


def truncated(kind: str) -> Spoil:
    def spoil(place: Place) -> None:
        path = place.layout.cache_path(kind, "C1")
        path.write_bytes(path.read_bytes()[:3000])

    return spoil


def same_everywhere(place: Place) -> None:
    for slide in ("A1", "B1", "C1"):
        with edited(place.layout.cache_path("target", slide)) as file:
            file["features"][...] = 1.0


def published(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Features as published files hold them, changed, in place of the caches."""

    def spoil(place: Place) -> None:
        for slide in ("A1", "B1", "C1"):
            for kind in ("target", "neighbor"):
                path = place.layout.cache_path(kind, slide)
                torch.save(change(torch.from_numpy(read_features(path))), path.with_suffix(".pt"))
                path.unlink()

    return spoil


def published_outside(place: Place) -> None:
    place.spots(outside)
    published(lambda features: features)(place)


def spec(**changes: object) -> Spoil:
    def spoil(place: Place) -> None:
        lines = {"patient_pattern": "'^([A-Z])'", "image_pattern": "'{patient}/{slide}/*'"} | changes
        text = "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None)
        place.layout.spec_path.write_text(text)

    return spoil


def twice_a_key(place: Place) -> None:
    place.layout.spec_path.write_text("image_pattern: '{slide}'\nimage_pattern: '{patient}/{slide}/*'\n")


def twin(*parts: str) -> Spoil:
    """B1 becomes A1 in its image, with the features of it, or in its counts."""

    def spoil(place: Place) -> None:
        layout = place.layout
        if "image" in parts:
            image = layout.image_path("B1")
            image.unlink()
            shutil.copy(layout.image_path("A1"), image.with_suffix(layout.image_path("A1").suffix))
        for path_of in (layout.counts_path, layout.spots_path, *(layout_cache(layout, kind) for kind in KINDS)):
            shutil.copy(path_of("A1"), path_of("B1"))
        if "counts" not in parts:
            counts(lambda table: table + 1, "B1")(place)
        if "image" not in parts:
            fingerprint = h5py.File(layout.cache_path("target", "A1")).attrs["image_fingerprint"]
            layout.image_path("B1").unlink()
            for kind in KINDS:
                with edited(layout.cache_path(kind, "B1")) as file:
                    file.attrs["image_fingerprint"] = fingerprint.replace("-", "-9", 1)

    return spoil


def layout_cache(layout, kind: str) -> Callable[[str], Path]:
    return lambda slide: layout.cache_path(kind, slide)


def another_image(place: Place) -> None:
    path = place.layout.image_path("B1")
    path.write_bytes(path.read_bytes() + b" ")


def second_image(place: Place) -> None:
    image = place.layout.image_path("B1")
    shutil.copy(image, image.with_name("second.png"))


def flags(*words: object) -> Spoil:
    return lambda _: list(words)


def without(path_of: Callable[[Place], Path], *words: object, spoil: Spoil | None = None) -> Spoil:
    def remove(place: Place) -> list[object]:
        path_of(place).unlink()
        return [*words, *((spoil(place) if spoil else None) or [])]

    return remove


def locked(place: Place) -> None:
    """By another process, until the test process ends."""
    fcntl.flock(os.open(place.layout.cache_path("token", "C1"), os.O_RDONLY), fcntl.LOCK_EX)


def sparse_counts(array: str, row: int, value: int) -> Spoil:
    def spoil(place: Place) -> None:
        path = place.layout.counts_path("B1")
        table = pd.read_parquet(path)
        path.unlink()
        names = {"obs": pd.DataFrame(index=table.index.astype(str)), "var": pd.DataFrame(index=table.columns)}
        anndata.AnnData(sparse.csr_matrix(table.to_numpy()), **names).write_h5ad(path.with_name("B1.h5ad"))
        with h5py.File(path.with_name("B1.h5ad"), "r+") as file:
            file[f"X/{array}"][row] = value

    return spoil


def crafted_panel(place: Place) -> list[object]:
    place.layout.panel_path.write_bytes(CRAFTED)
    return ["--protocol", "paper"]


def unmeasured(place: Place) -> list[object]:
    panel = np.load(place.layout.panel_path)
    place.counts(lambda table: table.drop(columns=panel[:2]))
    return ["--protocol", "paper"]


def blocker(place: Place) -> None:
    place.logs.touch()


def started(spoil: Spoil | None, *words: object) -> Spoil:
    """A run of two folds is there (`_run_beside` put a link to it beside the data); the third is to be added."""

    def begin(place: Place) -> list[object]:
        shutil.copytree(place.config.parent / "run", place.logs / place.config.stem / "exp_0")
        return [*words, *((spoil(place) if spoil else None) or [])]

    return begin


def of_run(file: str, change: Callable[[Path], object]) -> Spoil:
    return lambda place: change(place.logs / place.config.stem / "exp_0" / file) and None


def written(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode("latin-1"))


def cut(path: Path) -> int:
    return path.write_bytes(path.read_bytes()[:999])


def begun(change: Callable[[Path], object]) -> Spoil:
    """Fold 1 has ended its training and waits for its scores; `change` gets its best.pt."""

    def spoil(place: Place) -> None:
        of_run("fold_1/result.json", Path.unlink)(place)
        of_run("fold_1/best.pt", change)(place)

    return spoil


def with_nan(path: Path) -> None:
    edit(path, lambda content: next(iter(content["model"].values())).view(-1)[0].fill_(torch.nan))


def shuffled(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(table.to_numpy()[::-1], index=table.index, columns=table.columns)


RESUME = "--resume"
DAMAGED = {
    "metrics.jsonl": "3",
    "genes.txt": "\xff\xfe",
    "per_gene_slide.csv": "a,b",
    "result.json": "{}",
    "predictions/A1.h5ad": "?",
}
WRONG_WEIGHTS = {"none": (Path.unlink, "does not exist"), "no numbers": (with_nan, "not finite")}
BAD: dict[str, tuple[Spoil, str]] = {
    **{name: (table(what, change), said) for name, (what, change, _, said) in BAD_TABLES.items()},
    "log-normalised counts": (counts(np.log1p), "no integers"),
    "infinite counts": (counts(lambda t: t.astype(float).where(t < 3, np.inf)), "counts above 2147483647"),
    "a gene with a line break": (counts(lambda t: t.rename(columns={t.columns[0]: "NL\nX"})), "gene"),
    "no training slide has a count": (counts(lambda t: (t * 0).astype(t.dtypes)), "count"),
    "genes of no other slide": (
        counts(lambda t: t.add_prefix("x"), "A1"), r"A1 \(x.* has none of the \d+ genes that B1, C1 have in common"),
    "ids beside symbols": (
        counts(with_ids, "A1"), r"The genes of A1 have Ensembl ids \(ENSG0.*those of B1, C1 have symbols .*--gene_map"),
    "two tables of counts": (tables_beside("A1", ".tsv", ".csv"), r"2 tables of counts where one was expected: A1.tsv, A1.csv"),
    "a spot outside its image": (published_outside, "lie outside"),
    "features of other spots": (lambda place: place.spots(lambda t: t.iloc[:-2]), r"holds \d+ spots but the slide has"),
    "a truncated cache": (truncated("neighbor"), "truncated"),
    "a truncated token cache": (truncated("token"), "truncated"),
    "a fault of the disk in a cache": (number("target", 0.5), "not what was written"),
    **{f"a missing number in {name} {kind} cache": (number(kind, np.nan, **how), r"C1\.h5 is damaged.*not finite")
       for kind in KINDS for name, how in {"an earlier": {"is_earlier": True}, "a sealed": {"is_sealed": True}}.items()},
    "a fault of the disk in a token cache": (
        number("token", 0.5), r"C1\.h5 is damaged: the tokens of spot \S+ in view 0 are not what was written"),
    "a locked token cache": (locked, "it is locked"),
    "tokens of another image": (attribute("token", "image_fingerprint", "f"), "another image file"),
    "neighbor features of another image, whose image is not there": (
        without(lambda place: place.layout.image_path("B1"), spoil=attribute("neighbor", "image_fingerprint", "f")),
        "n_features.*B1.h5 .*another image file"),
    "features of another precision": (attribute("neighbor", "precision", "bfloat16"), "its precision is bfloat16, expected fl"),
    "features with another rule outside the image": (attribute("target", "fill", "black"), "its fill is black, expected white"),
    "sparse counts that point nowhere": (sparse_counts("indices", 0, 300), r"B1\.h5ad.*indices holds 300"),
    "sparse counts of rows that end nowhere": (sparse_counts("indptr", 3, 10**9), r"B1\.h5ad.*indptr"),
    "a panel that is a crafted pickle": (crafted_panel, "genes_demo.npy cannot be read as an array of names"),
    "features that are all the same": (same_everywhere, "the same for every training spot"),
    "features of other weights": (attribute("target", "encoder_sha256", "f" * 64), "weights"),
    "tokens of other weights": (attribute("token", "encoder_sha256", "f" * 64), "weights"),
    "tokens of another type": (attribute("token", "dtype", "float32"), "float32"),
    "published features of another width": (published(lambda x: x[..., :64].contiguous()), "width"),
    "published features that are missing": (published(lambda x: x * torch.nan), "not finite"),
    "published features of other spots": (published(lambda x: x[:-1]), "spots|rows"),
    "another image than was encoded": (another_image, "another image file"),
    "two images of a slide": (second_image, "2 images"),
    "no token cache where one is asked for": (
        without(lambda place: place.layout.cache_path("token", "B1"), "--set", "DATA.tokens=cache"), "no token cache"),
    "no weights for the encoder of every step": (
        without(lambda place: place.layout.cache_path("token", "B1"), "--weights", "none.bin"), "none.bin"),
    "weights that are none": (
        without(lambda place: place.layout.cache_path("token", "B1"), "--weights", __file__), Path(__file__).name),
    "the counts of two patients are the same": (twin("counts"), "A1 .patient A. and B1 .patient B. have the same counts"),
    "two patients share an image": (twin("image"), "A1 .patient A. and B1 .patient B. have the same image"),
    "a slide whose patient is forgotten": (
        spec(patient_pattern=None, patient_of_slide="{A1: A, B1: B}"), "'C1' of demo has no known patient"),
    "a slide whose name is misspelt": (spec(patient_of_slide="{Cl: C}"), "'Cl'"),
    "a key twice": (twice_a_key, "twice|more than once"),
    "k larger than a batch": (flags("--k", 500), "k = 500"),
    "more genes than there are": (flags("--set", "DATA.num_genes=9999"), "genes"),
    "a gene that is not there": (flags("--genes", "NOGENE,NOR"), "NOGENE is on no slide"),
    "no panel": (without(lambda place: place.layout.panel_path, "--protocol", "paper"), "genes_demo.npy"),
    "a panel gene that is not measured": (unmeasured, "2 of"),
    "a fold that is not there": (flags("--fold", 9), "fold 9 cannot be run"),
    "a device that is not there": (flags("--device", "nonsense"), "nonsense"),
    "a patch that the encoder does not take": (flags("--set", "DATA.patch_size=7"), "7"),
    "heads that do not divide": (flags("--set", "MODEL.global_heads=5"), "5"),
    "a file in place of the runs": (blocker, "blocker|is a file"),
    "a run that is there": (started(None), "already holds an unfinished run: --resume goes on"),
    "a fold that is finished": (
        started(None, "--fold", 0), r"already holds fold_0 of a run, finished: its summary is \S+/exp_0/summary\.md;"),
    "a run of another configuration": (started(None, RESUME, "--k", 5), "LOSS.k"),
    "a run of other counts": (started(counts(shuffled, "B1"), RESUME), "slide B1: other counts"),
    "a run of another image": (started(another_image, RESUME), "another image file"),
    "a run of another image, whose images are not there": (
        started(twin("fingerprint"), RESUME), "slide B1: other .*and image than then"),
    **{f"a run whose configuration is {name}": (
        started(of_run("config.yaml", change), RESUME), rf"exp_0/config\.yaml {said}; expected the whole configuration")
       for name, change, said in (
           ("empty", written(""), "is empty"), ("cut", cut, "lacks EVALUATION"))},
    "a run of other features": (started(number("target", 0.25, is_sealed=True), RESUME), "slide C1: other features"),
    "a run whose record is damaged": (
        started(of_run("fold_1/split.json", lambda path: path.write_text("{")), RESUME), "split.json"),
    "a run whose checkpoint is truncated": (
        started(of_run("fold_0/best.pt", cut), RESUME), r"fold_0/best\.pt.*move it elsewhere: the fold keeps its scores"),
    **{f"a run whose {name} is damaged": (
        started(of_run(f"fold_0/{name}", written(content)), RESUME),
        rf"fold_0/{name}\b(.|\n)*A test makes it again: python main\.py --mode test --model_path \S+/fold_0\b")
       for name, content in DAMAGED.items()},
    "a run whose clusters are damaged": (
        started(of_run("fold_0/clusters.csv", written("slide\n")), RESUME), r"fold_0/clusters\.csv .*Move it elsewhere"),
    **{f"a fold in work whose best weights are {name}": (
        started(begun(change), RESUME),
        rf"fold_1/best\.pt.*{said}.* It holds epoch \d of 2, .*move it and \S+last\.pt elsewhere")
       for name, (change, said) in WRONG_WEIGHTS.items()},
    "a run without its configuration": (
        started(of_run("config.yaml", lambda path: path.unlink() or 1), RESUME), "holds no config.yaml"),
}  # fmt: skip


def doctor(place: Place, *more: object) -> Left:
    return call_main(
        "--mode", "doctor", "--config_name", place.config, "--data_dir", place.layout.data_dir, "--log_path", place.logs,
        "--device", "cpu", *more,
    )  # fmt: skip


def check_both_refuse(place: Place, words: list[object], said: str) -> None:
    found, trained = doctor(place, *words), place.train(*words)
    for name, left in (("training", trained), ("doctor", found)):
        assert left.status == 2 and "Traceback" not in left.said, f"{name}: {left.status}\n{left.said}"
        assert re.search(said, left.said), f"{name}: {said!r} is not in:\n{left.said}"
    if place.logs.is_dir():
        assert not list(place.logs.rglob("fold_2")), "nothing was begun"


@pytest.fixture
def _run_beside(place, tiny_run) -> None:
    (place.config.parent / "run").symlink_to(tiny_run.path)


@pytest.mark.usefixtures("_run_beside")
@pytest.mark.parametrize("case", BAD)
def test_what_training_refuses_the_doctor_has_found(case, place):
    spoil, said = BAD[case]
    check_both_refuse(place, spoil(place) or [], said)


@pytest.mark.usefixtures("_run_beside")
def test_what_is_advised_mends_the_files_of_a_complete_fold(place):
    """All of them at once, and the split as well; the same command goes on then."""
    started(None)(place)
    fold = place.logs / place.config.stem / "exp_0" / "fold_0"
    before = {name: (fold / name).read_bytes() for name in (*DAMAGED, "split.json") if not name.endswith("h5ad")}
    for name, content in DAMAGED.items():
        written(content)(fold / name)
    (fold / "split.json").unlink()
    (advice,) = set(re.findall(r"python main\.py (--mode test .*)", place.train(RESUME).said))
    left = call_main(*shlex.split(advice), "--no_report")
    assert left.status == 0, left.said
    for name in ("metrics.jsonl", "genes.txt"):
        assert f"{name} was damaged (kept as {name.replace('.', '.damaged.')}) and is written again" in left.said
    after = {name: (fold / name).read_bytes() for name in before}
    found, expected = (json.loads(files.pop("split.json")) for files in (after, before))
    assert found == {name: value for name, value in expected.items() if name != "run_notes"}
    assert after == before
    assert doctor(place, RESUME).status == 0


@pytest.mark.usefixtures("_run_beside")
def test_what_is_advised_goes_on_without_the_best_weights(place, tiny_run):
    run = place.logs / place.config.stem / "exp_0"
    started(begun(cut))(place)
    cut(run / "fold_0" / "best.pt")
    for name in ("fold_0/best.pt", "fold_1/best.pt", "fold_1/last.pt"):
        (run / name).rename(run / name.replace("/", "_"))
    assert place.train(RESUME, "--fold", 1).status == 0
    assert (run / "fold_1" / "result.json").read_bytes() == (tiny_run.path / "fold_1" / "result.json").read_bytes()


@pytest.mark.usefixtures("_run_beside")
def test_what_is_advised_brings_an_emptied_configuration_back(place):
    started(of_run("config.yaml", written("")))(place)
    assert place.train("--run_name", "other", "--fold", 0).status == 0
    runs = place.logs / place.config.stem
    shutil.copy(runs / "other" / "config.yaml", runs / "exp_0")
    assert doctor(place, RESUME).status == 0


def test_of_large_token_caches_it_is_said_what_was_not_read(place, monkeypatch):
    number("token", np.nan, is_earlier=True)(place)
    monkeypatch.setattr("modes.training.run_data.TOKENS_READ_FIRST", 0)
    found = doctor(place, "--fold", 0)
    assert found.status == 2 and re.search(r"problem +training +\S+C1\.h5 is damaged: the tokens", found.said), (
        found.said
    )
    monkeypatch.setattr("modes.checks.rehearsal._TOKENS_READ", 1)
    found = doctor(place, "--fold", 0)
    assert found.status == 0, found.said
    assert re.search(
        r"warning +tokens +of .* GB of token caches one spot in \d+ was read.*The others were not", found.said
    )


@pytest.mark.parametrize(("name", "value"), [("num_neighbors", 5), ("microns_per_pixel", 0.25)])
def test_what_no_number_of_target_features_depends_on_may_differ(place, name, value):
    """The grid that was configured when they were made, and a size of pixels that nothing is computed from."""
    attribute("target", name, value)(place)
    found = doctor(place, "--fold", 0)
    assert found.status == 0 and "other" not in found.said, found.said


@pytest.mark.usefixtures("_run_beside")
def test_side_files_do_not_stop_a_run(place, tiny_run):
    """The versions of a run, and the epochs of a fold whose checkpoint has them."""
    run = place.logs / place.config.stem / "exp_0"
    started(begun(lambda _: None))(place)
    (run / "versions.json").write_text("{")
    (run / "fold_1" / "metrics.jsonl").write_text("3")
    found = doctor(place, RESUME, "--fold", 1)
    assert found.status == 0 and re.search(r"warning +run +\S+versions\.json cannot be read", found.said), found.said
    left = place.train(RESUME, "--fold", 1)
    assert left.status == 0 and "It is kept as" in left.said, left.said
    assert (run / "versions.damaged.json").read_text() == "{" and len(read_versions(run / "versions.json")) == 1
    assert (run / "fold_1" / "metrics.jsonl").read_bytes() == (tiny_run.path / "fold_1" / "metrics.jsonl").read_bytes()


def test_a_fold_that_another_process_trains(place):
    lock = place.logs / place.config.stem / "exp_0" / ".fold_1.lock"
    lock.parent.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        check_both_refuse(place, [], rf"is being trained or tested by process {process.pid}")
        process.kill()


def test_what_is_good_passes_and_what_a_kill_left_is_named(place, tiny_run):
    place.layout.cache_path("token", "A1").with_name(".A1.abcdefgh.h5").write_bytes(bytes(1000))
    tiny_run.copy(place.logs / place.config.stem).rename(place.logs / place.config.stem / "exp_0")
    left = doctor(place, RESUME)
    assert left.status == 0 and "Nothing would stop this run" in left.said, left.said
    assert re.search(r"warning +left over +1 temporary files .*\.A1\.abcdefgh\.h5", left.said)


def test_counts_beside_the_prepared_ones_are_said_once(place):
    for slide in ("A1", "B1"):
        tables_beside(slide, ".tsv", is_kept=True)(place)
    left = doctor(place, "--fold", 0)
    assert left.status == 0 and left.said.count("beside the prepared one") == 1, left.said
    assert re.search(r"warning +data +2 of 3 slides .*A1, B1\. Of A1 A1_sub\.parquet is read, not A1\.tsv\.", left.said)


def test_slides_without_a_count_are_said(place):
    counts(lambda table: (table * 0).astype(table.dtypes), "A1")(place)
    left = doctor(place, "--fold", 0)
    assert left.status == 0 and re.search("warning +tables +no spot has a count of any gene on A1", left.said), (
        left.said
    )
