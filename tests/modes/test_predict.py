"""Slides without counts: positions of any kind, grids on tissue, fields of view, files that scanpy plots, refusals."""

from __future__ import annotations

import shutil
import sys
import weakref
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image, ImageDraw

import main
from datasets.batches import SlideBatch, SpotBatch
from datasets.features.encoding import encode_slide
from datasets.images.geometry import neighbor_validity
from datasets.images.slides import open_slide
from modes.external_test import external_test
from modes.predict import PredictOptions, predict
from modes.prediction.encode import Chunk, open_patch_encoder, plan_for, whole_slide
from modes.prediction.ensemble import load_members, shared_genes
from modes.prediction.place_spots import spots_on_tissue
from modes.prediction.predicted import note_on_seen_image, predict_mean, predict_spots
from preprocess.extract_features_uni import main as extract
from tests.checkpoints import edit
from tests.space_ranger import write_outs
from utils.checkpoint import checkpoints_of_runs, chosen_checkpoints, load_checkpoint
from utils.locks import temporary_prefix

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def external(tiny_run) -> tuple[Path, Path]:
    """Image and spot table of the simulated external slide."""
    root = tiny_run.data_dir / "test" / "demo_external"
    return root / "ST-imgs/X/X1/X1.jpg", root / "ST-spotfiles/X1_selection.tsv"


@pytest.fixture(scope="module")
def predicted(tiny_run, external, tmp_path_factory) -> anndata.AnnData:
    """The external slide at the spots of its table, by the mean of both folds."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("predicted") / "X1.h5ad"
    return anndata.read_h5ad(predict(tiny_run.path, PredictOptions(external[0], out, external[1]), None, [], CPU))


def _predict(run, tmp_path: Path, image, *, fold: int | None = 0, **options) -> anndata.AnnData:
    out = tmp_path / "out" / "prediction.h5ad"
    return anndata.read_h5ad(predict(run.path, PredictOptions(image, out, overwrite=True, **options), fold, [], CPU))


def _training_image(run, slide: str) -> Path:
    return next((run.data_dir / "demo" / "ST-imgs" / slide[0] / slide).iterdir())


def test_an_image_of_the_training_is_told(tiny_run, tmp_path, capsys):
    """Fold 0 tests A1 and fold 1 B1; C1 has a part in both."""
    spots = tiny_run.data_dir / "demo/ST-spotfiles/A1_selection.tsv"
    adata = _predict(tiny_run, tmp_path, _training_image(tiny_run, "A1"), spots=spots, fold=None)
    said = (
        "LEAKAGE: 1 of 2 models (fold_1) had a part of their training on this image (slide A1), so the prediction looks better "
        "than one of unseen tissue. fold_0 held it out: predict with --fold 0."
    )
    assert said in capsys.readouterr().out.splitlines() and adata.uns["gene_dml"]["leakage"] == said
    adata = _predict(tiny_run, tmp_path, _training_image(tiny_run, "A1"), spots=spots, fold=0)
    assert "LEAKAGE" not in capsys.readouterr().out and "leakage" not in adata.uns["gene_dml"]


def test_who_has_seen_an_image(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_slide(_training_image(tiny_run, "A1")) as a, open_slide(_training_image(tiny_run, "C1")) as c:
        of_a, of_c = a.fingerprint(), c.fingerprint()

    def note(fingerprint: str, *runs: Path, fold: int | None = None) -> str | None:
        return note_on_seen_image(load_members(checkpoints_of_runs(runs, fold)[0], [], CPU), fingerprint)

    assert note("another", tiny_run.path) is None
    both = note(of_c, tiny_run.path)
    assert "2 of 2 models (fold_0, fold_1)" in both and both.endswith("No finished fold held it out.")
    assert "1 of 1 models (fold_1)" in note(of_a, tiny_run.path, fold=1)
    assert note(of_a, tiny_run.path, fold=1).endswith("fold_0 held it out: predict with --fold 0.")
    first, second = (shutil.copytree(tiny_run.path, tmp_path / "logs" / name) for name in ("first", "second"))
    several = note(of_a, first, second)
    assert "2 of 4 models (first/fold_1, second/fold_1)" in several and several.endswith("predict with --fold 0.")
    shutil.rmtree(second / "fold_0")
    assert note(of_a, first, second).endswith("It was held out by --model_path logs/first --fold 0.")
    edit(second / "fold_1" / "best.pt", lambda content: content["fold"].pop("digests"))
    assert note(of_a, second) is None, "an earlier version recorded none"


def _tissue_slide(path: Path, *, mpp: float = 1.6, kind: str = "pyramid") -> tuple[np.ndarray, tuple[int, int]]:
    """A white slide with one disc of stained tissue, as a pyramidal TIFF. Returns (is tissue (H, W), size)."""
    random = np.random.default_rng(0)
    width, height = 900, 700
    disc = Image.new("L", (width, height), 0)
    ImageDraw.Draw(disc).ellipse((150, 120, 560, 540), fill=255)
    inside = np.asarray(disc) > 0
    picture = np.full((height, width, 3), 243, dtype=np.int64)
    picture[inside] = (190, 120, 170)
    picture = (picture + random.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)
    picture[30:60, 700:860] = (60, 60, 60)  # a grey shadow at the edge of the glass
    options = {"photometric": "rgb", "tile": (128, 128), "compression": "adobe_deflate"}
    with tifffile.TiffWriter(path) as tiff:
        resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
        tiff.write(picture, subifds=2 if kind == "pyramid" else 0, **options, **resolution)
        for factor in (2, 4) if kind == "pyramid" else ():
            tiff.write(picture[::factor, ::factor], subfiletype=1, **options)
    return inside, (width, height)


def test_spots_of_a_table_get_what_the_external_test_gives_them(tiny_run, external, tmp_path):
    """Two ways to one number: caches and verified tables there, everything on the fly here."""
    data_dir = Path(shutil.copytree(tiny_run.data_dir / "test", tmp_path / "data" / "test")).parent
    flags = [
        "--config",
        tiny_run.config_name,
        "--mode",
        "external",
        "--test_name",
        "demo_external",
        "--num_workers",
        "1",
    ]
    extract([*flags, "--extract_mode", "all", "--views", "1", "--data_dir", str(data_dir), "--device", "cpu"])
    folder = external_test(
        tiny_run.copy(tmp_path), "demo_external", None, [f"DATA.data_dir={data_dir}"], CPU, with_report=False
    )
    tested = anndata.read_h5ad(folder / "predictions" / "X1.h5ad")
    table = pd.read_csv(external[1], sep="\t")  # lists spots beside the tissue too, which have no counts
    table = table[[f"{x}x{y}" in tested.obs_names for x, y in zip(table["x"], table["y"])]]
    table.sample(frac=1, random_state=1).to_csv(tmp_path / "spots.tsv", sep="\t", index=False)
    found = _predict(tiny_run, tmp_path, external[0], spots=tmp_path / "spots.tsv", fold=None)
    assert set(found.obs_names) == set(tested.obs_names) and set(tested.var_names) < set(found.var_names)
    here = found[tested.obs_names, tested.var_names]
    np.testing.assert_array_equal(here.obsm["spatial"], tested.obsm["spatial"])
    np.testing.assert_allclose(here.X, tested.X, atol=2e-3)  # the token cache holds float16
    for scale in ("target", "neighbor", "global"):
        np.testing.assert_allclose(here.layers[scale], tested.layers[scale], atol=2e-3)
    apart = np.abs(tested.X[:, None] - tested.X[None]).max(axis=2) + np.eye(len(tested))
    assert apart.min() > 2e-3, "spots could be mistaken for each other"


@pytest.mark.parametrize("held_bytes", [0, 60_000, 10**9])
def test_a_grid_of_patches_gets_what_every_spot_encoded_alone_gets(tiny_run, tmp_path, monkeypatch, held_bytes):
    """Shared tiles, one pass or two: the slow way encodes the patch and the tiles of each spot anew."""
    monkeypatch.setattr("modes.prediction.encode._HELD_BYTES", held_bytes)
    _tissue_slide(tmp_path / "disc.tif")
    members = load_members(chosen_checkpoints(tiny_run.path, 0)[0], [], CPU)
    encoder, plan = open_patch_encoder(members[0], CPU), plan_for(members[0], ("target", "token", "neighbor"))
    with open_slide(tmp_path / "disc.tif") as slide:
        spots = spots_on_tissue(slide, pitch_px=None, pitch_um=None, mpp=None, covered_px=64, min_tissue=None)
        centers, grid = spots.centers, spots.table.obsm["grid"]
        assert len(centers) > 20 and set(np.diff(centers[:, 0])) >= {64}
        found = predict_spots(members, members[0].genes, slide, centers, grid, encoder, 64)
        alone = [next(encode_slide(slide, center[None], encoder, plan)) for center in centers]
        is_valid = neighbor_validity(centers, slide.size, 64, plan.num_neighbors)
    target, token, neighbor = (
        torch.from_numpy(np.concatenate([getattr(one, kind) for one in alone]))
        for kind in ("target", "token", "neighbor")
    )
    chunk = Chunk(slice(0, len(centers)), token[:, 0], neighbor)
    slow = predict_mean(members, members[0].genes, whole_slide(target, grid, is_valid, lambda _: [chunk], CPU))
    for scale, values in slow.items():
        np.testing.assert_allclose(found.scales[scale], values, atol=1e-5, err_msg=scale)
    assert np.ptp(slow["fused"], axis=0).max() > 1e-3, "spots could be mistaken for each other"


def test_the_file_holds_what_the_pages_say(predicted, external):
    assert predicted.obs_names[0].count("x") == 1 and predicted.X.dtype == np.float32
    assert predicted.uns["unit"] == "log10(1 + counts per 10 000 of the panel)"
    (slide,) = predicted.uns["spatial"]
    assert slide == "X1" and "measured" not in predicted.layers
    entry = predicted.uns["spatial"][slide]
    width, _ = Image.open(external[0]).size
    height_here, width_here = entry["images"]["hires"].shape[:2]
    assert entry["scalefactors"]["tissue_hires_scalef"] == pytest.approx(width_here / width, rel=0.01) and height_here
    about = predicted.uns["gene_dml"]
    assert list(about["checkpoints"]) == ["fold_0/best.pt", "fold_1/best.pt"] and about["image"] == "X1.jpg"
    assert about["patch_covers_px"] == 64 and about["encoder"] == "efficientnet-lite0"


def test_a_shuffled_list_of_pixels_finds_its_array_and_keeps_its_order(tiny_run, external, predicted, tmp_path):
    """Each prediction stays with its pixel, and the grid found from pixels is the one of the table."""
    table = pd.read_csv(external[1], sep="\t").sample(frac=1, random_state=2)
    named = pd.DataFrame({"barcode": [f"s{i}" for i in table.index], "x": table["pixel_x"], "y": table["pixel_y"]})
    named.to_csv(tmp_path / "list.csv", index=False)
    found = _predict(tiny_run, tmp_path, external[0], spots=tmp_path / "list.csv", fold=None)
    assert list(found.obs_names) == list(named["barcode"])
    np.testing.assert_allclose(found.obsm["spatial"], named[["x", "y"]].to_numpy())
    ids = [f"{x}x{y}" for x, y in zip(table["x"], table["y"])]
    np.testing.assert_allclose(found.X, predicted[ids, found.var_names].X, atol=1e-4)
    moved = found.obsm["grid"] - predicted[ids].obsm["grid"]
    assert (moved == moved[0]).all()


def test_a_table_of_the_published_external_sets(tiny_run, external, predicted, tmp_path):
    """Exchanged convention: x counts rows, pixel_x is the image row; the same numbers for the same place."""
    table = pd.read_csv(external[1], sep="\t")
    exchanged = table.rename(columns={"x": "y", "y": "x", "pixel_x": "pixel_y", "pixel_y": "pixel_x"})
    exchanged.to_csv(tmp_path / "published.tsv", sep="\t", index=False)
    found = _predict(
        tiny_run, tmp_path, external[0], spots=tmp_path / "published.tsv", exchanged_pixels=True, fold=None
    )
    ids = ["x".join(reversed(spot.split("x"))) for spot in found.obs_names]
    np.testing.assert_allclose(found.X, predicted[ids].X, atol=1e-5)
    np.testing.assert_array_equal(found.obsm["spatial"], predicted[ids].obsm["spatial"])


@pytest.mark.parametrize("generation", [1, 2])
def test_positions_of_space_ranger(tiny_run, tmp_path, generation):
    picture = np.random.default_rng(1).integers(90, 250, (300, 360, 3), dtype=np.uint8)
    outs = write_outs(tmp_path / "outs", picture, ["A"], generation=generation, pitch=90.0)
    (path,) = (outs.folder / "spatial").glob("tissue_positions*")
    found = _predict(tiny_run, tmp_path, outs.image, spots=path)
    kept = [barcode for barcode, inside in zip(outs.barcodes, outs.in_tissue) if inside]
    assert list(found.obs_names) == kept
    np.testing.assert_allclose(found.obsm["spatial"], outs.pixels[outs.in_tissue], atol=1e-3)
    np.testing.assert_array_equal(
        found.obsm["grid"], np.stack([outs.array_col, outs.array_row], axis=1)[outs.in_tissue]
    )


def test_pyramid_is_predicted_on_its_tissue_and_plotted(tiny_run, tmp_path, capsys):
    import matplotlib

    matplotlib.use("Agg")
    import scanpy

    inside, _ = _tissue_slide(tmp_path / "slide.tif")
    gene = load_checkpoint(tiny_run.path / "fold_0" / "best.pt").genes[0]
    found = _predict(tiny_run, tmp_path, tmp_path / "slide.tif", pitch_um=100.0, genes=(gene,))
    x, y = found.obsm["spatial"].astype(int).T
    assert inside[y, x].mean() > 0.95, "background is left out"
    area = inside.sum() / 62.5**2  # spots that the tissue has room for
    assert 0.6 * area < len(found) <= 1.05 * area
    assert len(np.unique(found.obsm["grid"], axis=0)) == len(found)
    np.testing.assert_allclose(np.diff(np.unique(found.obsm["grid"][:, 0])), 1)
    assert len(scanpy.pl.spatial(found, color=gene, show=False)) == 1
    assert (tmp_path / "out" / f"prediction_{gene}.png").is_file()
    assert (tmp_path / "out" / f"prediction_{gene}.svg").is_file()
    said = capsys.readouterr().out
    assert "62.5 px apart (100 um)" in said and "Peak memory" in said and f"prediction_{gene}.png" in said


def test_without_a_pitch_patches_lie_side_by_side_and_it_is_said(tmp_path):
    _tissue_slide(tmp_path / "slide.tif")
    none = {"pitch_px": None, "pitch_um": None, "mpp": None, "min_tissue": None}
    with open_slide(tmp_path / "slide.tif") as slide:
        spots = spots_on_tissue(slide, **none, covered_px=64)
        fewer = spots_on_tissue(slide, **{**none, "min_tissue": 1.0}, covered_px=64)
        wider = spots_on_tissue(slide, **{**none, "pitch_um": 160.0, "mpp": 1.6}, covered_px=64)
    assert np.diff(np.unique(spots.centers[:, 0])).min() == 64
    assert "one patch beside the other (--pitch_px, --pitch_um)" in spots.note
    assert set(fewer.table.obs_names) < set(spots.table.obs_names) and "100 px apart (160 um)" in wider.note


def test_matched_field_of_view_gives_the_same_on_an_enlarged_slide(tiny_run, external, predicted, tmp_path, capsys):
    image, table = external
    enlarged = tmp_path / "X1.png"
    Image.fromarray(np.asarray(Image.open(image)).repeat(2, axis=0).repeat(2, axis=1)).save(enlarged)
    spots = pd.read_csv(table, sep="\t")
    spots[["pixel_x", "pixel_y"]] = 2 * np.floor(spots[["pixel_x", "pixel_y"]])
    spots.to_csv(tmp_path / "spots.tsv", sep="\t", index=False)
    options = {"spots": tmp_path / "spots.tsv", "mpp": 0.8, "fold": None}
    plain = _predict(tiny_run, tmp_path, enlarged, **options)
    assert "WARNING: A patch is 51 um wide on this slide and was 102 um wide in training" in capsys.readouterr().out
    matched = _predict(tiny_run, tmp_path, enlarged, match_mpp=True, **options)
    said = capsys.readouterr().out
    assert "A patch covers 128 px (102 um), scaled to 64 px" in said and "WARNING" not in said
    assert matched.uns["gene_dml"]["patch_covers_px"] == 128
    reference = predicted[matched.obs_names].X
    error = [np.abs(found.X - reference).mean() for found in (matched, plain)]
    assert error[0] < 1e-4 < 1e-3 < error[1]


def test_one_fold_and_the_mean_of_both(tiny_run, external, predicted, tmp_path):
    folds = [_predict(tiny_run, tmp_path / str(fold), external[0], spots=external[1], fold=fold) for fold in (0, 1)]
    genes = list(predicted.var_names)
    assert set(genes) == set(folds[0].var_names) & set(folds[1].var_names)
    np.testing.assert_allclose(predicted.X, (folds[0][:, genes].X + folds[1][:, genes].X) / 2, atol=1e-5)


def test_streaming_holds_one_batch_at_a_time_however_many_spots_there_are(tiny_run):
    """Memory is that of one batch of tokens, not of the slide: batches are made when asked for and let go."""
    members = load_members(chosen_checkpoints(tiny_run.path)[0], [], CPU)
    random = torch.Generator().manual_seed(0)
    num_spots, size, dim = 1200, 40, members[0].fold.encoder.dim
    features = torch.randn(num_spots, dim, generator=random)
    grid = torch.stack([torch.arange(num_spots) % 40, torch.arange(num_spots) // 40], dim=1)
    alive: list[weakref.ref] = []
    greatest = 0

    def batches():
        nonlocal greatest
        for start in range(0, num_spots, size):
            tokens = torch.randn(size, 16, dim, generator=random)
            alive.append(weakref.ref(tokens))
            greatest = max(greatest, sum(reference() is not None for reference in alive))
            yield SpotBatch(
                rows=torch.arange(start, start + size),
                target_tokens=tokens,
                patches=None,
                target_features=features[start : start + size],
                neighbor_features=torch.randn(size, 9, dim, generator=random),
                neighbor_is_valid=torch.ones(size, 9, dtype=torch.bool),
                expression=None,
            )

    genes = shared_genes(members)
    whole = predict_mean(members, genes, SlideBatch(features, grid, lambda _size: batches()))
    assert greatest <= 2 and len(alive) == num_spots // size
    assert whole["fused"].shape == (num_spots, len(genes)) and not np.isnan(whole["fused"]).any()


def test_streamed_rows_must_be_consecutive(tiny_run):
    members = load_members(chosen_checkpoints(tiny_run.path, 0)[0], [], CPU)
    dim = members[0].fold.encoder.dim
    batch = SpotBatch(torch.tensor([0, 2]), None, None, torch.zeros(2, dim), None, torch.ones(2, 9).bool(), None)
    grid = torch.tensor([[0, 0], [1, 0], [2, 0]])
    with pytest.raises(AssertionError, match="consecutive"):
        predict_mean(members, members[0].genes, SlideBatch(torch.zeros(3, dim), grid, lambda _size: iter([batch])))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"out": "x.csv"}, r"--out x.csv should end with .h5ad"),
            ({"pitch_px": 10.0, "pitch_um": 5.0}, "--pitch_px and --pitch_um are both given"),
            ({"spots": "s.csv", "pitch_px": 10.0}, "--pitch_px shape the grid on the tissue, but --spots gives"),
            ({"pitch_px": -1.0}, "--pitch_px should be more than zero"),
            ({"mpp": float("nan")}, "--mpp should be more than zero"),
            ({"mpp": 1e300}, "--mpp is micrometres per pixel, less than 100"),
            ({"min_tissue": 3.0}, "--min_tissue is a share of a patch"),
            ({"exchanged_pixels": True}, "--exchanged_pixels is about the columns of --spots"),
        ],
    )
    def test_flags_that_contradict(self, tiny_run, options, message):
        with pytest.raises(ValueError, match=message):
            predict(tiny_run.path, PredictOptions(**{"image": "slide.tif", "out": "x.h5ad", **options}), None, [], CPU)

    def test_all_of_them_in_one_message(self, tiny_run):
        with pytest.raises(ValueError) as error:
            predict(tiny_run.path, PredictOptions("i", "x.csv", pitch_px=0.0, mpp=-1.0), None, [], CPU)
        assert len(str(error.value).splitlines()) == 3

    def test_run_or_slide_that_are_not_there(self, tiny_run, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"missing.tif does not exist. --image should be"):
            _predict(tiny_run, tmp_path, tmp_path / "missing.tif")
        with pytest.raises(FileNotFoundError, match=r"holds no checkpoint"):
            predict(tmp_path, PredictOptions("slide.tif", "x.h5ad"), None, [], CPU)

    @pytest.mark.parametrize("stem", ["slide 1 ", ".hidden", "n" * 210])
    def test_a_slide_whose_name_no_file_can_hold_is_refused_before_it_is_encoded(
        self, tiny_run, external, tmp_path, monkeypatch, stem
    ):
        monkeypatch.setattr("modes.predict.predict_spots", lambda *_: pytest.fail("the slide was encoded"))
        image = Path(shutil.copy(external[0], tmp_path / f"{stem}.jpg"))
        with pytest.raises(
            ValueError, match=r"The name of the slide, that of --image without its ending, .* not a plain"
        ):
            _predict(tiny_run, tmp_path, image)

    def test_what_comes_beside_the_file_has_room_in_its_name(self, tiny_run, external, tmp_path):
        """The page beside it has the longer name, and a map one with the gene in it."""
        longest = 255 - len(temporary_prefix("")) - 8
        for length, genes in ((longest - 10, ()), (longest - 20, ("G" * 20,))):
            options = PredictOptions(external[0], tmp_path / f"{'n' * length}.h5ad", external[1], genes=genes)
            with pytest.raises(OSError, match="its name is too long for the file system"):
                predict(tiny_run.path, options, 0, [], CPU)
        assert list(tmp_path.iterdir()) == []

    def test_gene_that_is_not_predicted_names_its_neighbors(self, tiny_run, external, tmp_path):
        gene = load_checkpoint(tiny_run.path / "fold_0" / "best.pt").genes[0]
        with pytest.raises(ValueError, match=rf"--genes {gene}X: not among the \d+ genes .*near: .*{gene}"):
            _predict(tiny_run, tmp_path, external[0], genes=(gene + "X",))

    def test_sizes_that_need_the_size_of_a_pixel(self, tiny_run, external, tmp_path):
        for options in ({"pitch_um": 100.0}, {"match_mpp": True}):
            with pytest.raises(
                ValueError, match=r"needs the size of a pixel, which the slide does not tell. Give --mpp"
            ):
                _predict(tiny_run, tmp_path, external[0], **options)

    def test_positions_outside_the_slide(self, tiny_run, external, tmp_path):
        table = pd.read_csv(external[1], sep="\t")
        table[["pixel_x", "pixel_y"]] *= 5
        table.to_csv(tmp_path / "far.tsv", sep="\t", index=False)
        with pytest.raises(ValueError, match=r"spots lie outside .*X1.jpg .*not the full-resolution one"):
            _predict(tiny_run, tmp_path, external[0], spots=tmp_path / "far.tsv")

    def test_slide_without_tissue(self, tiny_run, tmp_path):
        noise = np.random.default_rng(0).normal(240, 3, (300, 300, 1)).repeat(3, axis=2)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(tmp_path / "blank.png")
        with pytest.raises(ValueError, match=r"No spot of the 4 x 4 grid .* lies on tissue: 0.0 %"):
            _predict(tiny_run, tmp_path, tmp_path / "blank.png")

    def test_weights_of_another_encoder(self, tiny_run, external, tmp_path):
        run = tiny_run.copy(tmp_path)
        edit(run / "fold_0" / "best.pt", lambda content: content["encoder"].update(sha256="f" * 64))
        options = PredictOptions(external[0], tmp_path / "x.h5ad", external[1])
        with pytest.raises(
            ValueError, match=r"with the weights ffffffffffff.*Give the file of the training with --weights"
        ):
            predict(run, options, 0, [], CPU)


def test_command_line(tiny_run, external, tmp_path, monkeypatch, capsys):
    gene = load_checkpoint(tiny_run.path / "fold_0" / "best.pt").genes[0]
    out = tmp_path / "x.h5ad"
    flags = [
        "--mode",
        "predict",
        "--image",
        str(external[0]),
        "--model_path",
        str(tiny_run.path / "fold_0"),
        "--out",
        str(out),
    ]
    flags += ["--spots", str(external[1]), "--genes", gene, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["main.py", *flags])
    main.main()
    assert anndata.read_h5ad(out).n_obs > 0 and (tmp_path / f"x_{gene}.png").is_file()
    assert "fold 0" in capsys.readouterr().out
