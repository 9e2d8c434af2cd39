"""Readers of what users draw and list, of bins, and of what other tools have made. Independent readers are bare libraries."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet
import torch
from anndata import AnnData
from PIL import Image
from scipy import sparse

from datasets.images.region import read_region
from datasets.tables.gene_list import given_genes
from preprocess.import_features import SlideFiles, read_patches
from preprocess.raw.anndata_file import AnnDataFile, find_slides, read_slide
from preprocess.raw.files import files_below, plain_image_size
from preprocess.raw.sample_sheet import COLUMNS, read_sample_sheet
from preprocess.raw.space_ranger.bins import choose_bins, find_bins, read_bins
from tests.soak.binary_readers import dense, names_in
from tests.soak.fuzz import Reader
from tests.soak.text_readers import (
    BARCODES,
    COUNTS,
    GENES,
    IDS,
    PIXELS,
    SPOTS,
    as_on_image,
    by_name,
    lines_of,
    positions_of,
    written,
)

_PLACES = np.array([[int(part) for part in spot.split("x")] for spot in SPOTS])
_IN_TISSUE = [1] * 8 + [0]
_POSITIONS = {
    "barcode": BARCODES,
    "in_tissue": _IN_TISSUE,
    "array_row": _PLACES[:, 1],
    "array_col": _PLACES[:, 0],
    "pxl_row_in_fullres": PIXELS[:, 1],
    "pxl_col_in_fullres": PIXELS[:, 0],
}


def position_parquet(folder: Path) -> Path:
    pd.DataFrame(_POSITIONS).to_parquet(folder / "tissue_positions.parquet", index=False)
    return folder / "tissue_positions.parquet"


def columns_of(path: Path) -> dict[str, np.ndarray]:
    table = pyarrow.parquet.read_table(path)
    return {name: np.array(table.column(name).to_pylist()) for name in _POSITIONS}


def positions_by_arrow(path: Path) -> object:
    barcode, in_tissue, row, column, y, x = columns_of(path).values()
    pixels, grid = np.stack([x, y], axis=1), np.stack([column, row], axis=1)
    return {"ids": [str(name) for name in barcode], "pixels": pixels, "grid": grid, "in_tissue": in_tissue == 1}


_BIN_UM, _SQUARE_UM, _ROWS, _COLUMNS = 8.0, 16.0, 6, 5


def hd_outs(folder: Path, *, damaged: str) -> Path:
    """One bin size of a slide of Visium HD, six rows of five bins; the file of the name `damaged` is."""
    bins = folder / "binned_outputs" / "square_008um"
    (bins / "spatial").mkdir(parents=True)
    row, column = (index.ravel() for index in np.mgrid[:_ROWS, :_COLUMNS])
    names = [f"s_008um_{r:05d}_{c:05d}-1" for r, c in zip(row, column)]
    tissue = np.arange(len(names)) % 7 != 3
    table = dict(zip(_POSITIONS, (names, tissue.astype(int), row, column, row * 16 + 40.25, column * 16 + 30.5)))
    pd.DataFrame(table).to_parquet(bins / "spatial" / "tissue_positions.parquet", index=False)
    factors = {"bin_size_um": _BIN_UM, "microns_per_pixel": 0.5, "tissue_hires_scalef": 0.25}
    (bins / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    stored = sparse.csr_matrix(np.random.default_rng(5).poisson(2, (int(tissue.sum()), len(GENES))))
    with h5py.File(bins / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(stored, name)
        group["shape"] = np.array(stored.shape[::-1])
        group["barcodes"] = np.array([name for name, kept in zip(names, tissue) if kept], dtype="S")
        group["features/id"], group["features/name"] = np.array(IDS, dtype="S"), np.array(GENES, dtype="S")
        group["features/feature_type"] = np.array(["Gene Expression"] * len(IDS), dtype="S")
    return next(path for path in bins.rglob("*") if path.name == damaged)


def _outs_of(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / "binned_outputs").is_dir())


def bins_of(path: Path) -> object:
    found = read_bins(choose_bins(find_bins(files_below(_outs_of(path))), _SQUARE_UM), _SQUARE_UM)
    positions, counts = found.positions, found.counts
    return {
        "grid": positions.grid,
        "pixels": positions.pixels,
        "genes": [counts.ids, counts.symbols],
        "counts": counts.matrix.toarray(),
        "factors": {name: value for name, value in found.scale_factors.items() if name != "bin_size_um"},
    }


def bins_by_hand(path: Path) -> object:
    """Every square by itself, bin by bin."""
    bins = _outs_of(path) / "binned_outputs" / "square_008um"
    factors = json.loads((bins / "spatial" / "scalefactors_json.json").read_text(encoding="utf-8-sig"))
    side = round(_SQUARE_UM / factors["bin_size_um"])
    _, in_tissue, row, column, y, x = columns_of(bins / "spatial" / "tissue_positions.parquet").values()
    members: dict[tuple[int, int], list[int]] = {}
    for i in range(len(row)):
        members.setdefault((row[i] // side, column[i] // side), []).append(i)
    squares = [key for key in sorted(members) if 2 * sum(in_tissue[i] == 1 for i in members[key]) >= side * side]
    with h5py.File(bins / "filtered_feature_bc_matrix.h5") as file:
        group = file["matrix"]
        genes = [[name.decode() for name in group[f"features/{part}"][:]] for part in ("id", "name")]
        named = [name.decode().split("_")[2:] for name in group["barcodes"][:]]
        kinds = group["features/feature_type"][:]
        single = dense(group, (len(named), len(genes[0])))
    of_bin = {(int(r), int(c.split("-")[0])): counts for (r, c), counts in zip(named, single)}
    counts = np.zeros((len(squares), len(genes[0])))
    for number, key in enumerate(squares):
        for i in members[key]:
            if in_tissue[i] == 1:
                counts[number] += of_bin.get((row[i], column[i]), 0)
    keep = [i for i, kind in enumerate(kinds) if kind == b"Gene Expression"]
    known = ("tissue_hires_scalef", "spot_diameter_fullres", "microns_per_pixel")
    return {
        "grid": np.array([[key[1], key[0]] for key in squares]),
        "pixels": np.array([[sum(v[i] for i in members[key]) / len(members[key]) for v in (x, y)] for key in squares]),
        "genes": [[names[i] for i in keep] for names in genes],
        "counts": counts[:, keep],
        "factors": {name: float(value) for name, value in factors.items() if name in known},
    }


def any_h5ad(folder: Path) -> Path:
    """Two slides in a file, counts in a layer, symbols in a column, and what scanpy keeps of Space Ranger."""
    places = np.concatenate([_PLACES, _PLACES])
    obs = {"slide": ["S1"] * 9 + ["S2"] * 9, "patient": ["P"] * 9 + ["Q"] * 9, "in_tissue": _IN_TISSUE * 2}
    names = [f"{barcode}_{slide}" for slide in ("S1", "S2") for barcode in BARCODES]
    frame = pd.DataFrame({**obs, "array_col": places[:, 0], "array_row": places[:, 1]}, index=names)
    counts = sparse.csr_matrix(np.concatenate([COUNTS, COUNTS[::-1]]).astype(np.float32))
    var = pd.DataFrame({"gene_name": GENES}, index=IDS)
    data = AnnData(np.log1p(counts), obs=frame, var=var, layers={"counts": counts})
    data.obsm["spatial"] = np.concatenate([PIXELS, PIXELS + 7])
    data.uns["spatial"] = {"S1": {"scalefactors": {"tissue_hires_scalef": 0.25, "spot_diameter_fullres": 65.5}}}
    data.write_h5ad(folder / "any.h5ad")
    return folder / "any.h5ad"


def slides_in(path: Path) -> object:
    source, found = AnnDataFile(path, "counts", False, "gene_name", "slide", "patient"), {}
    for slide in find_slides(source):
        content = read_slide(source, slide)
        counts, spots = content.counts, content.spots
        found[slide.name] = {
            "patient": slide.patient,
            "names": [counts.barcodes, spots["barcode"].tolist(), counts.ids, counts.symbols],
            "counts": counts.matrix.toarray(),
            "places": spots[["x", "y", "pixel_x", "pixel_y"]].to_numpy(np.float64),
            "factors": content.factors,
        }
    return found


def _words(group: h5py.Group | h5py.Dataset) -> list[str]:
    if isinstance(group, h5py.Dataset):
        return [str(name) for name in group.asstr()[:]]
    names = group["categories"].asstr()[:]
    return [str(names[code]) if code >= 0 else "nan" for code in group["codes"][:]]


def slides_by_h5py(path: Path) -> object:
    with h5py.File(path) as file:
        barcodes, ids = names_in(file, "obs"), names_in(file, "var")
        slides, patients, symbols = (
            _words(file[f"{where}"]) for where in ("obs/slide", "obs/patient", "var/gene_name")
        )
        counts = dense(file["layers/counts"], (len(barcodes), len(ids)))
        grid = np.stack([file["obs/array_col"][:], file["obs/array_row"][:]], axis=1)
        tissue, pixels = file["obs/in_tissue"][:], file["obsm/spatial"][:]
        libraries = file["uns/spatial"]
        factors = {name: {k: float(v[()]) for k, v in libraries[name]["scalefactors"].items()} for name in libraries}
    found = {}
    for slide in sorted(set(slides)):
        rows = [i for i, name in enumerate(slides) if name == slide]
        (patient,) = {patients[i] for i in rows}
        rows = [i for i in rows if tissue[i] == 1]
        names = [barcodes[i] for i in rows]
        known = factors.get(slide, {})
        found[slide] = {
            "patient": patient,
            "names": [names, names, ids, symbols],
            "counts": counts[rows],
            "places": np.concatenate([as_on_image(grid[rows], pixels[rows]), pixels[rows]], axis=1),
            "factors": {k: v for k, v in known.items() if k in ("tissue_hires_scalef", "spot_diameter_fullres")},
        }
    return found


_FEATURES = np.random.default_rng(6).random((len(SPOTS), 7)).astype(np.float32)


def features_of_a_tool(folder: Path, *, kind: str) -> Path:
    with h5py.File(folder / "S1.h5", "w") as file:
        file["embeddings" if kind == "hest" else "features"] = _FEATURES
        file["coords"] = np.floor(PIXELS - 32).astype(np.int64)
        if kind == "hest":
            file["barcodes"] = np.array([[barcode.encode()] for barcode in BARCODES])
        if kind == "trident":
            file["coords"].attrs.update({"patch_size_level0": 64, "patch_size": 32, "patch_level": 0})
        if kind == "clam":
            file["coords"].attrs.update({"patch_size": 32, "downsample": [2.0, 2.0]})
    return folder / "S1.h5"


def patches_of_a_tool(path: Path, *, kind: str) -> object:
    return vars(read_patches(SlideFiles(path), kind))


def patches_of_a_tool_by_h5py(path: Path, *, kind: str) -> object:
    with h5py.File(path) as file:
        features = file["embeddings" if kind == "hest" else "features"][:]
        coords, attributes = file["coords"][:], dict(file["coords"].attrs)
        names = [n.decode() for n in file["barcodes"][:].ravel()] if "barcodes" in file else None
    width = attributes.get("patch_size_level0") if kind == "trident" else None
    if kind == "clam":
        width = attributes["patch_size"] * attributes["downsample"][0]
    centers = coords if width is None else coords + width / 2
    return {"features": features, "centers": centers, "covered_px": width, "barcodes": names}


def features_of_clam(folder: Path, *, damaged: str) -> Path:
    """Coordinates and features apart, as CLAM's first and last step leave them."""
    for part in ("patches", "pt_files"):
        (folder / part).mkdir()
    with h5py.File(folder / "patches" / "S1.h5", "w") as file:
        file["coords"] = np.floor(PIXELS - 32).astype(np.int64)
        file["coords"].attrs.update({"patch_size": 64, "patch_level": 0})
    torch.save(torch.from_numpy(_FEATURES), folder / "pt_files" / "S1.pt")
    return folder / damaged


def patches_of_clam(path: Path) -> object:
    patches, tensors = (path.parents[1] / name for name in ("patches/S1.h5", "pt_files/S1.pt"))
    return vars(read_patches(SlideFiles(patches, tensors, patches), "clam"))


def patches_of_clam_by_h5py(path: Path) -> object:
    with h5py.File(path) as file:
        coords, width = file["coords"][:], file["coords"].attrs["patch_size"]
    return {"features": _FEATURES, "centers": coords + width / 2, "covered_px": width, "barcodes": None}


def sheet(folder: Path) -> Path:
    rows = ["Sample,Patient,outs,image"]
    for name, patient in (("S1", "P1"), ("S2", "P1"), ("S3", '"P 2"')):
        (folder / name).mkdir()
        (folder / f"{name}.tif").touch()
        rows.append(f"{name},{patient},{folder / name},{folder / name}.tif")
    (folder / "samples.csv").write_text("\n".join(rows) + "\n")
    return folder / "samples.csv"


def sheet_of(path: Path) -> object:
    return [[str(part) for part in vars(row).values()] for row in read_sample_sheet(path, for_training=True)]


def sheet_by_csv(path: Path) -> object:
    first = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    table = by_name(path, max(",;\t", key=first.count), lower=True)
    columns = [[cell.strip() for cell in table[name]] for name in COLUMNS]
    return [[s, p, str(Path(o)), str(Path(i))] for s, p, o, i in zip(*columns) if s or p or o or i]


_SIZE = (400, 300)
_OUTLINE = [[20, 30], [300, 30.5], [300, 250], [20, 250], [20, 30]]
_HOLE = [[60, 60], [90, 60], [90, 90.25], [60, 60]]
_FAR = [[310, 10], [390, 10], [390, 90], [310, 10]]
_DRAWN = [
    ({"type": "Polygon", "coordinates": [_OUTLINE, _HOLE]}, {"name": "tumour", "color": [200, 0, 0]}),
    ({"type": "MultiPolygon", "coordinates": [[_FAR], [_HOLE]]}, {"name": "Ignore*"}),
    ({"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [_FAR]}]}, None),
    ({"type": "Point", "coordinates": [3, 4]}, {"name": "mark"}),
]
_AREAS = json.dumps(
    {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "geometry": shape, "properties": {"objectType": "annotation", "classification": name}}
            for shape, name in _DRAWN
        ],
    },
    indent=1,
)


def areas_of(path: Path) -> object:
    return vars(read_region(path, _SIZE))


def areas_by_json(path: Path) -> object:
    found: dict[str, list] = {"wanted": [], "left_out": []}

    def collect(shape: object, place: str) -> None:
        kind = shape["type"]
        if kind == "GeometryCollection":
            for part in shape.get("geometries", []):
                collect(part, place)
        elif kind in ("Polygon", "MultiPolygon"):
            polygons = [shape["coordinates"]] if kind == "Polygon" else shape["coordinates"]
            found[place] += [[np.array([corner[:2] for corner in ring]) for ring in rings] for rings in polygons]

    for feature in json.loads(path.read_text(encoding="utf-8-sig")).get("features", []):
        if feature["type"] == "Feature" and feature.get("geometry") is not None:
            properties = feature.get("properties") or {}
            if properties.get("objectType") not in (None, "annotation"):
                continue
            named = properties.get("classification") or {}
            is_left_out = str(named.get("name")).startswith("Ignore")
            collect(feature["geometry"], "left_out" if is_left_out else "wanted")
        elif feature["type"] != "Feature":
            collect(feature, "wanted")
    return found


def mask(folder: Path, *, name: str) -> Path:
    y, x = np.mgrid[:75, :100]
    Image.fromarray((((x - 40) ** 2 + (y - 35) ** 2 < 900) * 255).astype(np.uint8)).save(folder / name)
    return folder / name


def mask_of(path: Path) -> object:
    found = read_region(path, _SIZE)
    return {"is_wanted": found.is_wanted, "scale": found.scale}


def mask_by_pillow(path: Path) -> object:
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        wanted = np.asarray(image.convert("RGB")).max(axis=2) > 0
    return {"is_wanted": wanted, "scale": np.array(wanted.shape[::-1]) / np.array(_SIZE)}


def size_by_pillow(path: Path) -> object:
    with Image.open(path) as image:
        return list(image.size)


def _of_tool(kind: str) -> Reader:
    parts = (features_of_a_tool, patches_of_a_tool, patches_of_a_tool_by_h5py)
    make, read, oracle = (partial(part, kind=kind) for part in parts)
    return Reader(f"features of {kind}", make, read, (oracle,))


def _hd(damaged: str, *, is_text: bool = False) -> Reader:
    return Reader(f"Visium HD {damaged}", partial(hd_outs, damaged=damaged), bins_of, (bins_by_hand,), is_text)


READERS = [
    Reader("tissue_positions.parquet", position_parquet, positions_of, (positions_by_arrow,)),
    _hd("tissue_positions.parquet"),
    _hd("scalefactors_json.json", is_text=True),
    _hd("filtered_feature_bc_matrix.h5"),
    Reader("any .h5ad", any_h5ad, slides_in, (slides_by_h5py,)),
    *map(_of_tool, ("trident", "clam", "hest")),
    Reader("features of clam .pt", partial(features_of_clam, damaged="pt_files/S1.pt"), patches_of_clam),
    Reader(
        "patches of clam",
        partial(features_of_clam, damaged="patches/S1.h5"),
        patches_of_clam,
        (patches_of_clam_by_h5py,),
    ),
    Reader("sample sheet", sheet, sheet_of, (sheet_by_csv,), True),
    Reader("region .geojson", written("region.geojson", _AREAS), areas_of, (areas_by_json,), True),
    Reader("region mask .png", partial(mask, name="region.png"), mask_of, (mask_by_pillow,)),
    Reader("region mask .bmp", partial(mask, name="region.bmp"), mask_of, (mask_by_pillow,)),
    Reader(
        "list of genes",
        written("genes.txt", "".join(f"{gene}\n" for gene in GENES)),
        lambda path: given_genes(str(path)),
        (lines_of,),
        True,
    ),
    Reader(
        "size of an image",
        partial(mask, name="small.png"),
        lambda path: list(plain_image_size(path)),
        (size_by_pillow,),
    ),
]
