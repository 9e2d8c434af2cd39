"""Bad input, end to end: each ends with exit status 2 and one message that names the file, the finding and the remedy.

Nothing of it starts a run: no folder is made, no cache is written.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets.features.cache import read_identity
from datasets.features.places import find_cache
from datasets.known_sets import get_spec
from datasets.layout import Layout
from tests.command_line import Left, call_extract, call_main


@dataclass(frozen=True)
class Place:
    """A copy of the tiny data set with its caches, to be spoilt."""

    layout: Layout
    config: Path
    logs: Path

    def counts(self, change: Callable[[pd.DataFrame], pd.DataFrame], slide: str = "B1") -> None:
        path = self.layout.counts_path(slide)
        table = pd.read_parquet(path)
        changed = change(table)
        path.unlink()
        changed.to_csv(path.with_name(f"{slide}.tsv"), sep="\t")  # text can hold what a typed column cannot

    def spots(self, change: Callable[[pd.DataFrame], pd.DataFrame], slide: str = "B1") -> None:
        path = self.layout.spots_path(slide)
        change(pd.read_csv(path, sep="\t")).to_csv(path, sep="\t", index=False)

    def without_caches(self) -> None:
        for kind in ("target", "neighbor", "token"):
            shutil.rmtree(self.layout.cache_path(kind, "B1").parent)

    def train(self, *more: object) -> Left:
        return call_main(
            "--mode", "train", "--config_name", self.config, "--data_dir", self.layout.data_dir, "--log_path", self.logs,
            "--device", "cpu", "--no_report", *more,
        )  # fmt: skip

    def extract(self, *more: object) -> Left:
        return call_extract(
            "--config", self.config, "--data_dir", self.layout.data_dir, "--device", "cpu", "--extract_mode", "target",
            "--num_workers", 0, *more,
        )  # fmt: skip


@pytest.fixture
def place(tiny_run, tmp_path) -> Place:
    data_dir = shutil.copytree(tiny_run.data_dir, tmp_path / "data")
    config = Path(shutil.copy(tiny_run.config_name, tmp_path))
    layout = Layout(data_dir, get_spec("demo", data_dir), patch_size=64, num_neighbors=3, encoder="efficientnet-lite0")
    return Place(layout, config, tmp_path / "logs")


def refused(left: Left, *patterns: object) -> None:
    """Exit status 2, and a message, not a traceback, in which every pattern is found."""
    assert left.status == 2, left.said
    assert "Traceback" not in left.said and left.said.count("error:") == 1
    message = left.said.split("error:", 1)[1]
    for pattern in patterns:
        assert re.search(str(pattern), message), f"{pattern!r} is not in:\n{message}"


def with_cell(table: pd.DataFrame, value: object) -> pd.DataFrame:
    changed = table.astype(object)
    changed.iloc[3, 2] = value
    return changed


def twice(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, table.iloc[[4]]])


def elsewhere(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(x=table["x"] + 500)


def outside(table: pd.DataFrame) -> pd.DataFrame:
    changed = table.copy()
    changed.loc[changed.index[2], "pixel_x"] = 1e6
    return changed


BAD_TABLES = {
    "text among the counts": ("counts", lambda t: with_cell(t, "many"), r"B1\.tsv", "non-numeric counts .'many' for gene"),
    "negative counts": ("counts", lambda t: with_cell(t, -3), r"B1\.tsv", r"negative counts \(-3 for gene"),
    "half a count": ("counts", lambda t: with_cell(t, 0.5), r"B1\.tsv", r"no integers \(0.5 for gene"),
    "a count missing": ("counts", lambda t: with_cell(t, np.nan), r"B1\.tsv", "missing counts|non-numeric counts"),
    "a spot counted twice": ("counts", twice, r"B1\.tsv", r"duplicated spots: \d+x\d+"),
    "no spot ids": ("counts", lambda t: t.reset_index(drop=True), r"B1\.tsv", "spot ids should look like '10x13'"),
    "a spot listed twice": ("spots", twice, r"B1_selection\.tsv", r"spots listed twice: \d+x\d+"),
    "no pixels": ("spots", lambda t: t.drop(columns="pixel_x"), r"B1_selection\.tsv", r"pixel_x missing"),
    "a pixel that is none": ("spots", lambda t: t.assign(pixel_y="?"), r"B1_selection\.tsv", "pixel_y is missing or no number"),
    "spots of another slide": ("spots", elsewhere, r"B1_selection\.tsv", "have no spot in common"),
}  # fmt: skip
REMEDIES = (
    r"correct or replace the file|Correct these rows|belong to different slides|Expected a tab separated table with"
)


@pytest.mark.parametrize("case", BAD_TABLES)
@pytest.mark.parametrize("program", ["train", "extract"])
def test_bad_tables(place, case, program):
    what, change, file, finding = BAD_TABLES[case]
    getattr(place, what)(change)
    refused(getattr(place, program)(), "Slide B1", file, finding, REMEDIES)
    assert not place.logs.exists()


@pytest.mark.parametrize("program", ["train", "extract"])
def test_a_spot_outside_the_image(place, program):
    place.spots(outside)
    if program == "train":  # the caches are of the old table as well, which would be said first
        for kind in ("target", "neighbor", "token"):
            place.layout.cache_path(kind, "B1").unlink()
    left = getattr(place, program)("--overwrite") if program == "extract" else place.train()
    if program == "train":
        refused(
            left, r"gt_features_efficientnet-lite0_64/B1\.h5 does not exist", "extract_features_uni.py .*--slides B1"
        )
    else:
        refused(
            left, "Slide B1: 1 of", r"lie outside .*B1.*\.(jpg|png)", r"at \(1000000, \d+\)", "Correct their pixel_x"
        )


def test_published_features_of_a_spot_outside_the_image(place):
    """Without an extraction the training itself has to see it."""
    import torch

    from datasets.features.cache import read_features

    place.spots(outside)
    for kind in ("target", "neighbor"):
        path = place.layout.cache_path(kind, "B1")
        torch.save(torch.from_numpy(read_features(path)), path.with_suffix(".pt"))
        path.unlink()
    refused(place.train(), "Slide B1: 1 of", r"lie outside .*B1.*\.(jpg|png)", "Correct their pixel_x")


def test_a_missing_image(place):
    place.without_caches()
    image = place.layout.image_path("B1")
    image.unlink()
    refused(
        place.extract("--slides", "B1"),
        "Slide B1 of demo has no image",
        "ST-imgs/B/B1",
        r"See docs/your_data\.md for the folders",
    )


@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_a_truncated_image(place, keep):
    place.without_caches()
    image = place.layout.image_path("B1")
    content = image.read_bytes()
    image.write_bytes(content[: int(keep * len(content))])
    refused(place.extract(), re.escape(str(image)), "truncated|not an image that can be read", "complete|again")
    assert not [
        path for path in place.layout.root.rglob("*") if path.stem.startswith((".B1", "B1")) and path.suffix == ".h5"
    ]


def test_images_that_cannot_be_told_apart(place):
    image = place.layout.image_path("B1")
    shutil.copy(image, image.with_name("second.png"))
    refused(place.train(), "B1 of demo has 2 images where one was expected", r"second\.png", "move the others away")


def test_a_gene_of_the_panel_that_a_slide_has_not_measured(place):
    panel = np.load(place.layout.panel_path)
    place.counts(lambda table: table.drop(columns=panel[:2]))
    left = place.train("--protocol", "paper")
    refused(
        left, "slide B1 has no counts for 2 of the", str(panel[0]), r"select_genes\.py --config CONFIG --out FILE\.npy"
    )
    assert not place.logs.exists()


def test_no_panel(place):
    place.layout.panel_path.unlink()
    refused(place.train("--protocol", "paper"), r"genes_demo\.npy does not exist", r"select_genes\.py")


def test_caches_of_another_encoder(place):
    """They took hours and may be wanted: nothing says to overwrite them, and nothing does."""
    mine = place.layout.cache_path("target", "A1")
    before = mine.read_bytes()
    left = place.train("--encoder", "resnet50", "--set", "DATA.tokens=cache")
    refused(
        left,
        r"gt_features_resnet50_64/A1\.h5 does not exist",
        r"There are those of efficientnet-lite0: work with DATA\.encoder=efficientnet-lite0",
        r"python preprocess/extract_features_uni\.py .*--encoder resnet50",
    )
    assert "--overwrite" not in left.said
    left = place.extract("--encoder", "resnet50", "--random_weights", "--overwrite")
    assert left.status == 0, left.said
    assert mine.read_bytes() == before and read_identity(mine.parents[1] / "gt_features_resnet50_64/A1.h5")


def test_plain_names_stay_readable_and_are_never_written_over(place):
    """Folders of earlier versions carry no encoder, whichever it was."""
    for kind in ("target", "neighbor", "token"):
        named, plain = place.layout.cache_paths(kind, "A1")
        for path in named.parent.glob("*.h5"):
            path.parent.parent.joinpath(plain.parent.name).mkdir(exist_ok=True)
            path.rename(plain.with_name(path.name))
    content = plain.read_bytes()
    left = place.extract("--slides", "A1")
    assert left.status == 0 and "Nothing to do" in left.said
    assert not list(named.parent.glob("*.h5")), "valid under its plain name: nothing is made again"
    assert place.train().status == 0
    uni = Layout(place.layout.data_dir, place.layout.spec, patch_size=64, num_neighbors=3)
    assert find_cache(uni, "target", "A1").parent.name == "gt_features_uni_64", "the plain place is taken"
    assert find_cache(place.layout, "target", "A1").parent.name == "gt_features_64"
    assert plain.read_bytes() == content


def test_caches_of_another_spot_table(place):
    place.spots(lambda table: table.iloc[:-2])
    refused(
        place.train(), r"gt_features_efficientnet-lite0_64/B1\.h5", r"holds \d+ spots but the slide has \d+ .*[12] extra",
        rf"extract_features_uni\.py --config {re.escape(str(place.config))} .*--slides B1",
    )  # fmt: skip
    refused(
        place.extract(),
        r"gt_features_efficientnet-lite0_64/B1\.h5",
        "made from another spot or count table",
        "--slides B1",
    )


def test_a_truncated_cache(place):
    path = place.layout.cache_path("neighbor", "C1")
    path.write_bytes(path.read_bytes()[:3000])
    refused(
        place.train(),
        r"n_features_efficientnet-lite0_3_64/C1\.h5 is truncated",
        r"extract_features_uni\.py .*neighbor.*C1",
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "TRAINING: {learning_rates: 1}",
            "unknown key 'TRAINING.learning_rates'; did you mean 'TRAINING.learning_rate'?",
        ),
        ("TRAINNG: {epochs: 1}", "unknown section 'TRAINNG'; did you mean 'TRAINING'?"),
        ("LOSS: {k: many}", "LOSS.k should be a whole number, found 'many'"),
        ("DATA: {type: her3st}", "Unknown data set 'her3st'.*Did you mean 'her2st'?"),
    ],
)
def test_a_wrong_configuration(place, line, said):
    place.config.write_text(line + "\n")
    for left in (place.train(), place.extract()):
        pattern = said if ".*" in said else re.escape(said)
        refused(left, pattern, *([r"tiny\.yaml"] if "her3st" not in line else []))


def test_a_misspelt_key_on_the_command_line(place):
    refused(place.train("--set", "LOSS.kk=3"), re.escape("unknown key 'LOSS.kk'; did you mean 'LOSS.k'?"))


def test_k_larger_than_the_smallest_batch(place):
    refused(
        place.train("--k", 500),
        r"k = 500 clusters, but the smallest batch of fold \w+ has \d+ spots",
        r"Choose --k \d+",
    )
    assert not place.logs.exists()


def test_a_fold_that_is_not_there(place):
    refused(place.train("--fold", 9), "fold 9 cannot be run", r"these can: 0 \(A\), 1 \(B\), 2 \(C\)")


def test_no_weights_are_told_before_anything_is_read(place):
    """The spoilt table is not even opened."""
    place.counts(lambda table: with_cell(table, "many"))
    left = place.train("--encoder", "uni", "--set", "DATA.tokens=online")
    refused(left, "No weights for encoder 'uni'", "weights/uni", "gated")
