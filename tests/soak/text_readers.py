"""Readers of text: counts, spots, positions, genes, metadata, YAML. The independent readers are csv, json, yaml and gzip."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from datasets.spec import DatasetSpec, read_spec
from datasets.tables.counts import gene_names, read_counts
from datasets.tables.positions import read_positions
from datasets.tables.spot_table import read_spots
from preprocess.prepare_stnet import read_pixel_table
from preprocess.raw.gene_map import read_gene_map, without_version
from preprocess.raw.hest import check_metadata, read_metadata
from preprocess.raw.training_panel import training_panel
from tests.soak.fuzz import Reader
from utils.config import Config, read_config, save_config
from utils.text import is_ensembl

GENES = ["ACTB", "ERBB2", "KRT19", "TP53", "CD3E", "CD74"]
IDS = [f"ENSG{141510 + i:011d}" for i in range(len(GENES))]
SPOTS = [f"{10 + i % 3}x{4 + i // 3}" for i in range(9)]
COUNTS = np.random.default_rng(0).poisson(3, (len(SPOTS), len(GENES))).astype(np.int32)
PIXELS = np.array([[float(part) for part in spot.split("x")] for spot in SPOTS]) * 40 + 100.25
BARCODES = [f"{'ACGT'[i % 4]}{'TGCA'[i // 4]}{i:03d}-1" for i in range(len(SPOTS))]


def written(name: str, text: str) -> Callable[[Path], Path]:
    """Return what writes the true file of a format, compressed if its name says so."""

    def make(folder: Path) -> Path:
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
        return folder / name

    return make


def text_of(path: Path) -> str:
    """The text of a file as any program would take it: unpacked, without a byte order mark."""
    content = path.read_bytes()
    return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")


def cells(path: Path, separator: str) -> list[list[str]]:
    """Rows of a table, by the csv module; rows without anything are left out."""
    rows = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=separator)
    return [row for row in rows if row and (len(row) > 1 or row[0].strip())]


def by_name(path: Path, separator: str, *, lower: bool = False) -> dict[str, list[str]]:
    """Columns of a table with a header; cells that a row lacks are empty."""
    header, *rows = cells(path, separator)
    names = [name.strip().lower() if lower else name for name in header]
    return {name: [row[i] if i < len(row) else "" for row in rows] for i, name in enumerate(names)}


def numbers(column: list[str]) -> np.ndarray:
    return np.array([float(cell) for cell in column])


def as_on_image(grid: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Columns and rows, exchanged where the pixels say that the other one runs along x."""
    turned = grid[:, ::-1]
    found = [sum(abs(np.corrcoef(each[:, i], pixels[:, i])[0, 1]) for i in (0, 1)) for each in (grid, turned)]
    return turned if found[1] > found[0] else grid


def table_text(separator: str) -> str:
    rows = [separator.join([spot, *map(str, row)]) for spot, row in zip(SPOTS, COUNTS.tolist(), strict=True)]
    return "\n".join([separator.join(["", *GENES]), *rows]) + "\n"


def counts_of(path: Path) -> object:
    data, names = read_counts(path), gene_names(path)
    assert names == data.var_names.tolist()
    return {"spots": data.obs_names.tolist(), "genes": names, "counts": data.X.toarray()}


def rounded(spot: str) -> str:
    return "x".join(str(round(float(part))) for part in spot.split("x"))


def counts_by_csv(path: Path) -> object:
    header, *rows = cells(path, "," if ".csv" in path.suffixes else "\t")
    genes = header[-(len(rows[0]) - 1) :]
    values = np.array([[float(cell) for cell in row[1:]] for row in rows])
    return {"spots": [rounded(row[0]) for row in rows], "genes": genes, "counts": values}


_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
_SPOT_ROWS = [(*spot.split("x"), f"{x:.2f}", f"{y:.2f}", i % 2) for i, (spot, (x, y)) in enumerate(zip(SPOTS, PIXELS))]
_SPOT_TEXT = "\n".join(["x\ty\tpixel_x\tpixel_y\tselected", *("\t".join(map(str, row)) for row in _SPOT_ROWS)]) + "\n"


def spots_of(path: Path) -> object:
    table = read_spots(path)
    chosen = [name for name in (*_COLUMNS, "selected") if name in table]
    return {"ids": table.index.tolist(), **{name: table[name].to_numpy(np.float64) for name in chosen}}


def spots_by_csv(path: Path) -> object:
    table = by_name(path, "\t")
    found = {name: numbers(table[name]) for name in _COLUMNS}
    if "selected" in table:
        found["selected"] = numbers([{"true": "1", "false": "0"}.get(c.strip().lower(), c) for c in table["selected"]])
    return {"ids": [f"{round(x)}x{round(y)}" for x, y in zip(found["x"], found["y"])], **found}


_SPACE_RANGER = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_POSITION_ROWS = [
    f"{barcode},{int(i % 4 != 0)},{spot.split('x')[1]},{spot.split('x')[0]},{y:.2f},{x:.2f}"
    for i, (barcode, spot, (x, y)) in enumerate(zip(BARCODES, SPOTS, PIXELS))
]
_POSITION_TEXT = "\n".join(_POSITION_ROWS) + "\n"
_PIXEL_TEXT = "\n".join(["barcode,x,y", *(f"{b},{x:.2f},{y:.2f}" for b, (x, y) in zip(BARCODES, PIXELS))]) + "\n"
_STNET_TEXT = "\n".join([",X,Y", *(f"{spot},{x:.2f},{y:.2f}" for spot, (x, y) in zip(SPOTS, PIXELS))]) + "\n"


def positions_of(path: Path) -> object:
    found = read_positions(path)
    grid = [] if found.grid is None else found.grid
    return {"ids": found.ids, "pixels": found.pixels, "grid": grid, "in_tissue": found.in_tissue}


def positions_by_csv(path: Path) -> object:
    """Whichever of the kinds the first line tells; ids are those of a column of ids, else made of the positions."""
    separator = "\t" if "\t" in text_of(path).partition("\n")[0] else ","
    rows = cells(path, separator)
    without_header = {6: _SPACE_RANGER, 3: ("barcode", "x", "y"), 2: ("x", "y")}.get(len(rows[0]))
    if without_header is not None and all(_is_number(cell) for cell in rows[0][1:]):
        table = {name: [row[i] for row in rows] for i, name in enumerate(without_header)}
    else:
        table = by_name(path, separator, lower=True)
    if set(_SPACE_RANGER) <= set(table):
        columns, array, flag = ("pxl_col_in_fullres", "pxl_row_in_fullres"), ("array_col", "array_row"), "in_tissue"
    elif {"pixel_x", "pixel_y"} <= set(table):
        columns, array, flag = ("pixel_x", "pixel_y"), ("x", "y"), "selected"
    else:
        columns, array, flag = ("x", "y"), None, "selected"
    pixels = np.stack([numbers(table[name]) for name in columns], axis=1)
    grid = [] if array is None else np.rint(np.stack([numbers(table[name]) for name in array], axis=1))
    named = next((table[name] for name in ("barcode", "spot_id", "id", "spot") if name in table), None)
    places = pixels if array is None else grid
    ids = named or [f"{round(x)}x{round(y)}" for x, y in np.asarray(places).tolist()]
    flags = numbers(table[flag]) == 1 if flag in table else np.ones(len(pixels), bool)
    return {"ids": ids, "pixels": pixels, "grid": grid, "in_tissue": flags}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def pixels_of(path: Path) -> object:
    table = read_pixel_table(path)
    return {"ids": table.index.tolist(), "pixels": table[["pixel_x", "pixel_y"]].to_numpy(np.float64)}


def pixels_by_csv(path: Path) -> object:
    header, *rows = cells(path, ",")
    places = [[name.strip().lower() for name in header].index(name) - len(header) for name in ("x", "y")]
    return {
        "ids": [rounded(row[0].removeprefix("X")) for row in rows],
        "pixels": np.array([[float(row[i]) for i in places] for row in rows]),
    }


_MAP_TEXT = "Gene stable ID,Gene name\n" + "".join(f"{i},{gene}\n" for i, gene in zip(IDS, GENES))
_METADATA = ("id", "dataset_title", "patient", "species", "pixel_size_um_estimated")
_METADATA_TEXT = (
    ",".join(_METADATA)
    + "\n"
    + "".join(f'S{i},"A study, of tumours",Patient {i % 2},Homo sapiens,0.{i + 1}\n' for i in range(6))
)


def gene_map_by_csv(path: Path) -> object:
    """The column of ids is the one with most of them, the symbols stand in the next, or under a usual name."""
    rows = cells(path, "\t" if "\t" in text_of(path).partition("\n")[0] else ",")
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    place = max(range(width), key=lambda i: sum(is_ensembl(row[i]) for row in rows))
    names = [] if is_ensembl(rows[0][place]) else [cell.strip().lower() for cell in rows[0]]
    symbol = names.index("gene name") if "gene name" in names else place + 1
    return {without_version(row[place]): row[symbol] for row in rows if is_ensembl(row[place]) and row[symbol]}


def metadata_of(path: Path) -> object:
    table = read_metadata(path)
    check_metadata(table, table.index.unique(), path)
    return {"id": table.index.tolist(), **{name: table[name].tolist() for name in _METADATA[1:] if name in table}}


def metadata_by_csv(path: Path) -> object:
    table = by_name(path, ",")
    names = [name for name in _METADATA if name in table]
    rows = list(dict.fromkeys(zip(*(table[name] for name in names))))  # of those that say the same, one
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


_SPEC_TEXT = yaml.safe_dump(
    {
        "patients": ["A", "B"],
        "patient_pattern": "^([A-Z])",
        "patient_of_slide": {"A1": "A", "B7": "B"},
        "image_pattern": "{slide}*.tif",
        "slides": ["A1", "A2", "B7"],
        "expected_spots": [5, 400],
        "microns_per_pixel": {"A": 0.5, "B": 0.25},
        "sort_by": "xy",
    },
    sort_keys=False,
)
_NOT_IN_FILE = ("name", "external", "prepared_by", "pitch_um", "source")


def spec_of(path: Path) -> object:
    spec = read_spec(path, name="x")
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in _NOT_IN_FILE}


def spec_by_yaml(path: Path) -> object:
    content = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    spec = DatasetSpec(name="x")
    known = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in _NOT_IN_FILE}
    assert set(content) <= set(known)
    for key in {"patients", "slides"} & set(content):
        content[key] = [str(name) for name in content[key]]  # a name that looks like a number is a name
    if "patient_of_slide" in content:
        content["patient_of_slide"] = {
            str(slide): str(patient) for slide, patient in content["patient_of_slide"].items()
        }
    return {**known, **content}


def config_file(folder: Path) -> Path:
    save_config(Config(), folder / "config.yaml")
    return folder / "config.yaml"


def config_by_yaml(path: Path) -> object:
    values = Config().to_dict()
    for section, entries in (yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}).items():
        for key, value in entries.items():
            is_number = isinstance(values[section][key], float) and value is not None
            values[section][key] = float(value) if is_number else value
    return values


def panel_of(path: Path) -> object:
    return training_panel(Path("data"), "x", path, None, None).genes


def lines_of(path: Path) -> object:
    return [line.strip() for line in text_of(path).split("\n") if line.strip()]


def scale_factors_by_json(path: Path) -> object:
    known = ("tissue_hires_scalef", "spot_diameter_fullres", "microns_per_pixel", "bin_size_um")
    return {name: float(value) for name, value in json.loads(text_of(path)).items() if name in known}


READERS = [
    Reader("counts .tsv", written("A1.tsv", table_text("\t")), counts_of, (counts_by_csv,), True),
    Reader("counts .csv", written("A1.csv", table_text(",")), counts_of, (counts_by_csv,), True),
    Reader("counts .tsv.gz", written("A1.tsv.gz", table_text("\t")), counts_of, (counts_by_csv,), True, True),
    Reader("spot table", written("A1_selection.tsv", _SPOT_TEXT), spots_of, (spots_by_csv,), True),
    Reader("--spots, pixels", written("spots.csv", _PIXEL_TEXT), positions_of, (positions_by_csv,), True),
    Reader(
        "tissue_positions.csv",
        written("tissue_positions.csv", ",".join(_SPACE_RANGER) + "\n" + _POSITION_TEXT),
        positions_of,
        (positions_by_csv,),
        True,
    ),
    Reader(
        "tissue_positions_list.csv",
        written("tissue_positions_list.csv", _POSITION_TEXT),
        positions_of,
        (positions_by_csv,),
        True,
    ),
    Reader("spots of STNet", written("spots_BC1.csv", _STNET_TEXT), pixels_of, (pixels_by_csv,), True),
    Reader("gene map", written("map.csv", _MAP_TEXT), read_gene_map, (gene_map_by_csv,), True),
    Reader("panel as text", written("panel.txt", "".join(f"{gene}\n" for gene in GENES)), panel_of, (lines_of,), True),
    Reader("HEST metadata", written("HEST_v1_1_0.csv", _METADATA_TEXT), metadata_of, (metadata_by_csv,), True),
    Reader("dataset.yaml", written("dataset.yaml", _SPEC_TEXT), spec_of, (spec_by_yaml,), True),
    Reader("configuration", config_file, lambda path: read_config(path).to_dict(), (config_by_yaml,), True),
]
