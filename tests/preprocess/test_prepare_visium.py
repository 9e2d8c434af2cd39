"""Space Ranger folders of both generations in, the documented layout out; images and genes that do not fit are refused."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from preprocess.extract_features_uni import COMMAND_LINE, resolve
from preprocess.prepare_visium import main, read_section
from preprocess.raw.space_ranger.outs import read_outs
from preprocess.raw.training_panel import training_panel
from tests.checkpoints import fabricated_fold
from tests.command_line import call
from tests.space_ranger import Outs, write_outs
from utils.checkpoint import save_checkpoint
from utils.config import load_config
from utils.files import load_names

SYMBOLS = ["GAPDH", "TP53", "ERBB2", "TBCE", "KRT5", "TBCE", "CD3E", "SILENT"]  # TBCE twice, as in 10x references
PANEL = ["CD3E", "ERBB2", "NOT_THERE", "SILENT", "TBCE", "TP53"]


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 255, (400, 520, 3), dtype=np.uint8)


@pytest.fixture
def panel_file(tmp_path) -> Path:
    path = tmp_path / "panel.txt"
    path.write_text("\n".join(PANEL) + "\n")
    return path


def _prepare(outs: Outs, data_dir: Path, panel: Path, *more: str, image: Path | None = None) -> Layout:
    flags = [
        "--source",
        str(outs.folder),
        "--image",
        str(image or outs.image),
        "--name",
        "visium",
        "--panel",
        str(panel),
    ]
    main([*flags, "--data_dir", str(data_dir), *more])
    return Layout(data_dir, get_spec("visium", data_dir))


def _with_barcodes(outs: Outs, change: Callable[[list[str]], list[str]]) -> None:
    with h5py.File(outs.folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        barcodes = change([barcode.decode() for barcode in file["matrix/barcodes"]])
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array(barcodes, dtype="S")


def test_counts_of_several_samples_are_refused(tmp_path, picture, panel_file):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    _with_barcodes(outs, lambda names: [name.replace("-1", "-2") if i % 2 else name for i, name in enumerate(names)])
    with pytest.raises(
        ValueError, match=r"bc_matrix\.h5 holds the counts of 2 samples \(barcodes end in -1, -2\).*own outs"
    ):
        _prepare(outs, tmp_path / "data", panel_file)
    assert not (tmp_path / "data").exists()


def test_counts_of_another_slide_are_refused(tmp_path, picture, panel_file):
    """The arrays of all slides have the same barcodes; other spots lie under the tissue."""
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    beside = [name for name, inside in zip(outs.barcodes, outs.in_tissue) if not inside]
    _with_barcodes(outs, lambda names: [*beside, *names[len(beside) :]])
    said = rf"counts of {len(beside)} spots that are not under tissue .* none of {len(beside)} that are .*Take both from one"
    with pytest.raises(ValueError, match=said):
        _prepare(outs, tmp_path / "data", panel_file)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("generation", "matrix"), [(1, "h5"), (2, "h5"), (1, "h5 v2"), (2, "mtx"), (3, "h5")])
def test_both_generations_give_the_documented_layout(tmp_path, picture, panel_file, generation, matrix, capsys):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS, generation=generation, matrix=matrix)
    layout = _prepare(outs, tmp_path / "data", panel_file, "--training_type", "demo")
    assert layout.root == tmp_path / "data" / "test" / "visium" and layout.spec.training_type == "demo"
    assert layout.spec.microns_per_pixel == {"visium": pytest.approx(100 / 60, rel=1e-3)}
    table = load_slide(layout, "visium")
    assert table.n_obs == outs.in_tissue.sum()
    # The row/column trap: x must be pxl_col_in_fullres, and every row of counts must stay with its own barcode.
    for i in np.flatnonzero(outs.in_tissue):
        row = table.obs_names.get_loc(f"{outs.array_col[i]}x{outs.array_row[i]}")
        assert table.obsm["spatial"][row] == pytest.approx(outs.pixels[i], abs=1e-3)
        assert table.obsm["grid"][row].tolist() == [outs.array_col[i], outs.array_row[i]]
        assert table[row, "ERBB2"].X.sum() == outs.counts[i, SYMBOLS.index("ERBB2")]
        assert table[row, "TBCE"].X.sum() == outs.counts[i, [3, 5]].sum()
    matched = load_names(layout.panel_path)
    assert matched == [gene for gene in PANEL if gene != "NOT_THERE"]
    assert [PANEL[i] for i in np.load(layout.panel_index_path)] == matched
    told = capsys.readouterr().out
    assert "5 of the 6 genes" in told and "not scored: NOT_THERE" in told and "added up: TBCE" in told
    assert "60.0 px between neighbors" in told and "extract_features_uni.py --mode external" in told


def test_rows_of_a_hexagonal_array_touch_by_one_column(tmp_path, picture, panel_file):
    """The stated convention: the 3 x 3 neighborhood holds a spot's four neighbors in the rows above and below."""
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    grid = load_slide(_prepare(outs, tmp_path / "data", panel_file), "visium").obsm["grid"]
    differences = grid[:, None] - grid[None]
    touching = (np.abs(differences).max(axis=2) == 1).sum(axis=1)
    assert touching.max() == 4
    assert ((np.abs(differences[..., 0]) == 1) <= (np.abs(differences[..., 1]) % 2 == 1)).all()


def test_a_gene_measured_as_zero_is_kept_for_a_panel_that_comes_later(tmp_path, picture, panel_file):
    outs = write_outs(tmp_path / "outs", picture, [*SYMBOLS, "ZERO"])
    with h5py.File(outs.folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        data, indices = file["matrix/data"][:], file["matrix/indices"][:]
        data[np.isin(indices, [SYMBOLS.index("SILENT"), len(SYMBOLS)])] = 0
        file["matrix/data"][:] = data
    table = load_slide(_prepare(outs, tmp_path / "data", panel_file, "--sample", "S1"), "S1")
    assert table[:, ["SILENT", "ZERO"]].X.sum() == 0
    panel_file.write_text("TP53\nZERO\n")
    layout = _prepare(outs, tmp_path / "data", panel_file, "--sample", "S2")
    assert load_names(layout.panel_path) == ["TP53", "ZERO"]


def test_samples_share_a_set_and_only_genes_of_all_of_them_match(tmp_path, picture, panel_file):
    first = write_outs(tmp_path / "a" / "outs", picture, SYMBOLS)
    second = write_outs(tmp_path / "b" / "outs", picture, SYMBOLS[1:], pitch=50.0, seed=1)
    _prepare(first, tmp_path / "data", panel_file, "--sample", "S1")
    fewer = write_outs(tmp_path / "c" / "outs", picture, ["TP53", "CD3E", "OTHER"], seed=2)
    _prepare(second, tmp_path / "data", panel_file, "--sample", "S2")
    layout = _prepare(fewer, tmp_path / "data", panel_file, "--sample", "S3")
    assert layout.slides_on_disk() == ["S1", "S2", "S3"] and load_names(layout.panel_path) == ["CD3E", "TP53"]
    assert layout.spec.microns_of("S2") == pytest.approx(2.0, rel=1e-3)
    assert layout.spec.microns_of("S1") == pytest.approx(100 / 60, rel=1e-3)


def test_ensembl_panel_is_matched_by_the_ids_and_said(tmp_path, picture, capsys):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    panel = tmp_path / "panel.txt"
    panel.write_text("ENSG00000000002.7\nENSG00000000003\nENSG99999999999\n")
    layout = _prepare(outs, tmp_path / "data", panel)
    assert load_names(layout.panel_path) == ["ENSG00000000002.7", "ENSG00000000003"]
    table = load_slide(layout, "visium", ["ENSG00000000002.7"])
    assert table.X.sum() == outs.counts[outs.in_tissue, 1].sum()
    assert "matched by Ensembl ids: the panel lists Ensembl ids" in capsys.readouterr().out


def test_file_without_symbols_needs_a_table_and_takes_one(tmp_path, picture, panel_file, capsys):
    ids = [f"ENSG{i:011d}" for i in range(1, len(SYMBOLS) + 1)]
    outs = write_outs(tmp_path / "outs", picture, ids, ids=ids, matrix="mtx")
    with pytest.raises(ValueError, match=r"One lists Ensembl ids, the other symbols.*--gene_map"):
        _prepare(outs, tmp_path / "data", panel_file)
    assert not (tmp_path / "data").exists()
    table = tmp_path / "map.tsv"
    table.write_text("".join(f"{i}\t{symbol}\n" for i, symbol in zip(ids, SYMBOLS)))
    layout = _prepare(outs, tmp_path / "data", panel_file, "--gene_map", str(table))
    assert "TP53" in load_names(layout.panel_path) and "symbols by --gene_map" in capsys.readouterr().out


def test_no_common_gene_tells_the_cause(tmp_path, picture, panel_file):
    mouse = write_outs(tmp_path / "outs", picture, [symbol.capitalize() for symbol in SYMBOLS])
    with pytest.raises(ValueError, match=r"No gene of the panel .*differ only in upper and lower case.*species"):
        _prepare(mouse, tmp_path / "data", panel_file)


def test_images_that_are_not_the_full_resolution_one_are_refused(tmp_path, picture, panel_file):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    hires = outs.folder / "spatial" / "tissue_hires_image.png"
    with pytest.raises(
        ValueError, match=r"130 x 100 pixels, the positions of .*outs refer to about 520 x 400.*smaller tissue_hires"
    ):
        _prepare(outs, tmp_path / "data", panel_file, image=hires)
    turned, enlarged = tmp_path / "turned.png", tmp_path / "enlarged.png"
    Image.fromarray(picture).transpose(Image.Transpose.ROTATE_90).save(turned)
    with pytest.raises(ValueError, match="sides are exchanged"):
        _prepare(outs, tmp_path / "data", panel_file, image=turned)
    Image.fromarray(picture).resize((1040, 800)).save(enlarged)
    with pytest.raises(ValueError, match="scaled by about 2"):  # all positions lie inside it
        _prepare(outs, tmp_path / "data", panel_file, image=enlarged)
    hires.unlink()  # without it, positions outside the image tell
    small = tmp_path / "small.png"
    Image.fromarray(picture).resize((130, 100)).save(small)
    with pytest.raises(ValueError, match=r"spots lie outside .*small.png.*not the full-resolution one"):
        _prepare(outs, tmp_path / "data", panel_file, image=small)
    assert not list((tmp_path / "data").rglob("*.parquet"))


def test_without_the_smaller_image_another_one_tells_or_it_is_said(tmp_path, picture):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    spatial, enlarged = outs.folder / "spatial", tmp_path / "enlarged.png"
    Image.fromarray(picture).resize((1040, 800)).save(enlarged)
    (spatial / "tissue_hires_image.png").rename(spatial / "tissue_lowres_image.png")
    said = read_section(outs.folder, enlarged, None).notes[-1]  # the scale factor is not that of this one
    assert said.startswith("WARNING: whether enlarged.png is the full-resolution image was not checked by its size")
    factors = (spatial / "scalefactors_json.json").read_text()
    (spatial / "scalefactors_json.json").write_text(factors.replace("hires", "lowres"))
    with pytest.raises(ValueError, match=r"about 520 x 400 \(tissue_lowres_image.*scaled by about 2"):
        read_section(outs.folder, enlarged, None)
    assert "WARNING" not in " ".join(read_section(outs.folder, outs.image, None).notes)


def test_unreadable_or_foreign_sources(tmp_path, picture, panel_file):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    positions = outs.folder / "spatial" / "tissue_positions.csv"
    text = positions.read_text()
    positions.write_text(text.replace("-1,", "-2,"))
    with pytest.raises(ValueError, match=r"No barcode of .*tissue_positions.csv.*different slides"):
        _prepare(outs, tmp_path / "data", panel_file)
    positions.write_text("\n".join(line.replace(",1,", ",0,", 1) for line in text.splitlines()))
    with pytest.raises(ValueError, match=r"none of \d+ spots is under tissue"):
        _prepare(outs, tmp_path / "data", panel_file)
    positions.unlink()
    with pytest.raises(FileNotFoundError, match=r"no tissue_positions.csv and no tissue_positions_list.csv"):
        _prepare(outs, tmp_path / "data", panel_file)
    positions.write_text(text)
    matrix = outs.folder / "filtered_feature_bc_matrix.h5"
    matrix.write_bytes(matrix.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cannot be read as a matrix of Space Ranger"):
        _prepare(outs, tmp_path / "data", panel_file)
    matrix.unlink()
    with pytest.raises(FileNotFoundError, match="no filtered_feature_bc_matrix"):
        _prepare(outs, tmp_path / "data", panel_file)


def test_the_second_run_keeps_and_a_changed_one_needs_overwrite(tmp_path, picture, panel_file):
    outs = write_outs(tmp_path / "a" / "outs", picture, SYMBOLS)
    _prepare(outs, tmp_path / "data", panel_file, "--link")
    layout = _prepare(outs, tmp_path / "data", panel_file)
    assert layout.image_path("visium").is_symlink()
    other = write_outs(tmp_path / "b" / "outs", picture, SYMBOLS, seed=3)
    with pytest.raises(ValueError, match="Keep it elsewhere and repeat"):
        _prepare(other, tmp_path / "data", panel_file)
    _prepare(other, tmp_path / "data", panel_file, "--overwrite")


def test_a_set_of_another_origin_is_not_mixed_with_ours(tmp_path, picture, panel_file):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    (tmp_path / "data" / "test" / "visium" / "ST-cnts").mkdir(parents=True)
    with pytest.raises(ValueError, match="set of another origin"):
        _prepare(outs, tmp_path / "data", panel_file)


def test_the_panel_comes_from_one_place(tmp_path, tiny_data):
    panel = training_panel(tiny_data, "mine", None, "demo", None)
    assert panel.genes == load_names(tiny_data / "demo" / "genes_demo.npy") and panel.type == "demo"
    for name, training_type in (("mine", None), ("10x_breast_ff1", "her2st"), ("mine", "skinst")):
        given = None if name.startswith("10x") else training_type
        panel = training_panel(tmp_path, name, None, given, None)
        assert panel.genes == [] and panel.type == training_type  # nothing reads one, so none is asked for


@pytest.mark.parametrize(
    ("config_name", "changes", "said"),
    [
        (
            "her2st/dml",
            (),
            "--config her2st/dml --mode external --test_name visium --extract_mode {kind} --data_dir {data}",
        ),
        (
            "demo/dml",
            ("DATA.encoder=uni", "DATA.patch_size=112", "DATA.num_neighbors=3"),
            "--config demo/dml --mode external --test_name visium --extract_mode {kind} --data_dir {data} --encoder uni "
            "--set DATA.patch_size=112 --num_n 3",
        ),
        (
            "elsewhere/mine",
            ("DATA.encoder=resnet50",),
            "--mode external --test_name visium --extract_mode {kind} --data_dir {data} --encoder resnet50",
        ),
    ],
)
def test_the_commands_said_for_a_run_make_the_features_it_was_trained_on(
    tmp_path, picture, capsys, config_name, changes, said
):
    config = load_config("her2st/dml" if config_name == "elsewhere/mine" else config_name, changes)
    run, data = tmp_path / "logs" / "run", tmp_path / "data"
    fold = fabricated_fold(genes=["TP53", "CD3E"], config=config, config_name=config_name)
    save_checkpoint(run / "fold_0" / "best.pt", fold)
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    flags = [
        "--source",
        outs.folder,
        "--image",
        outs.image,
        "--name",
        "visium",
        "--model_path",
        run,
        "--data_dir",
        data,
    ]
    main([str(flag) for flag in flags])
    told = capsys.readouterr().out.splitlines()
    for kind in ("target", "neighbor"):
        command = f"Next: python preprocess/extract_features_uni.py {said.format(kind=kind, data=data)}"
        assert command in told, told
        given = COMMAND_LINE.parse(shlex.split(command)[3:])
        found = resolve(given)[0].DATA
        wanted = config.DATA
        assert (found.encoder, found.patch_size, found.num_neighbors) == (
            wanted.encoder, wanted.patch_size, wanted.num_neighbors
        )  # fmt: skip
    assert (
        told[-1] == f"Then: python main.py --mode external_test --test_name visium --model_path {run} --data_dir {data}"
    )


def test_scale_factors_stand_in_where_the_array_cannot_be_fitted(tmp_path, picture):
    from preprocess.raw.space_ranger.output import microns_per_pixel

    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    positions = outs.folder / "spatial" / "tissue_positions.csv"
    positions.write_text(
        "\n".join(positions.read_text().splitlines()[:3])
    )  # header, one spot beside the tissue, one on it
    assert microns_per_pixel(read_outs(outs.folder)) == pytest.approx(100 / 60, rel=1e-3)
    (outs.folder / "spatial" / "scalefactors_json.json").unlink()
    assert microns_per_pixel(read_outs(outs.folder)) is None


def test_geo_names_are_found(tmp_path, picture):
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS, generation=1)
    flat = tmp_path / "geo"
    flat.mkdir()
    for path in [*outs.folder.rglob("*.csv"), *outs.folder.rglob("*.json"), *outs.folder.rglob("*.h5")]:
        shutil.copy(path, flat / f"GSM1_{path.name}")
    subprocess.run(["gzip", str(flat / "GSM1_tissue_positions_list.csv")], check=True)
    assert len(read_outs(flat).positions) == outs.in_tissue.sum()


def test_command_line_ends_with_status_2_and_one_message(tmp_path):
    flags = ["--source", tmp_path / "none", "--image", "x.tif", "--name", "v", "--panel", tmp_path / "none.npy"]
    left = call(main, *flags)
    assert left.status == 2 and "Traceback" not in left.said and left.said.startswith("error: ")


def test_a_section_that_is_refused_does_not_bind_the_next_command(tmp_path, picture, panel_file):
    """Nothing of it was written, so its patient and the set are free to be named anew."""
    outs = write_outs(tmp_path / "outs", picture, SYMBOLS)
    sheet, data_dir = tmp_path / "samples.csv", tmp_path / "data"
    Image.fromarray(picture[:200, :200]).save(tmp_path / "small.tif")
    for sample, patient, image, is_right in (("a", "P", "small.tif", False), ("b", "Q", "fullres.tif", True)):
        rows = ["sample,patient,outs,image", f"{sample},{patient},{outs.folder},{tmp_path / image}"]
        sheet.write_text("\n".join(rows) + "\n")
        words = ["--samples", str(sheet), "--name", "mine", "--test", "--panel", str(panel_file)]
        if is_right:
            main([*words, "--data_dir", str(data_dir)])
        else:
            with pytest.raises(ValueError, match="small"):
                main([*words, "--data_dir", str(data_dir)])
            assert not list(data_dir.rglob("dataset.yaml"))
    assert Layout(data_dir, get_spec("mine", data_dir)).slides_with_counts() == ["b"]
