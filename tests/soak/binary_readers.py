"""Readers of arrays: parquet, AnnData, Space Ranger, HEST, panels, caches, PyTorch. Independent readers are bare libraries."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet
import torch
from scipy import sparse

from datasets.features.block_store import BlockStore
from datasets.features.cache import opened, write_cache
from datasets.features.identity import CacheIdentity
from datasets.features.published import read_published, verify_published
from models.patch_encoders.weights import read_weights
from modes.import_reference import _state_dict
from preprocess.raw.files import files_below, write_counts
from preprocess.raw.hest import HestSample, read_expression
from preprocess.raw.hest_patches import HestPatches
from preprocess.raw.space_ranger.matrices import read_matrix
from preprocess.raw.space_ranger.output import read_scale_factors
from tests.caches import as_earlier
from tests.checkpoints import fabricated_fold
from tests.soak.fuzz import Reader
from tests.soak.text_readers import (
    BARCODES,
    COUNTS,
    GENES,
    IDS,
    PIXELS,
    SPOTS,
    as_on_image,
    counts_of,
    rounded,
    scale_factors_by_json,
    text_of,
    written,
)
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.files import load_names
from utils.trained_fold import OptimizationState
from utils.untrusted.tensors import check_tensors, load_tensors


def adata() -> anndata.AnnData:
    obs = pd.DataFrame(index=SPOTS)
    return anndata.AnnData(sparse.csr_matrix(COUNTS), obs=obs, var=pd.DataFrame(index=GENES))


def our_parquet(folder: Path) -> Path:
    write_counts(folder / "A1.parquet", adata(), overwrite=True)
    return folder / "A1.parquet"


def pandas_parquet(folder: Path) -> Path:
    pd.DataFrame(COUNTS, index=pd.Index(SPOTS, name="spot"), columns=GENES).to_parquet(folder / "A1.parquet")
    return folder / "A1.parquet"


def counts_by_arrow(path: Path) -> object:
    table = pyarrow.parquet.read_table(path)
    spots = next(name for name in table.column_names if pyarrow.types.is_string(table.schema.field(name).type))
    genes = [name for name in table.column_names if name != spots]
    values = np.stack([table.column(name).to_numpy() for name in genes], axis=1)
    return {"spots": [rounded(str(spot)) for spot in table.column(spots).to_pylist()], "genes": genes, "counts": values}


def h5ad(folder: Path) -> Path:
    adata().write_h5ad(folder / "A1.h5ad")
    return folder / "A1.h5ad"


def names_in(file: h5py.File, axis: str) -> list[str]:
    return [str(name) for name in file[axis][file[axis].attrs["_index"]].asstr()[:]]


def dense(group: h5py.Group, shape: tuple[int, int]) -> np.ndarray:
    """A compressed matrix by rows, entry by entry."""
    values, (data, indices, indptr) = np.zeros(shape), (group[name][:] for name in ("data", "indices", "indptr"))
    for row in range(shape[0]):
        for place in range(indptr[row], indptr[row + 1]):
            values[row, indices[place]] += data[place]
    return values


def counts_by_h5py(path: Path) -> object:
    with h5py.File(path) as file:
        spots, genes = names_in(file, "obs"), names_in(file, "var")
        counts = dense(file["X"], (len(spots), len(genes)))
    return {"spots": [rounded(spot) for spot in spots], "genes": genes, "counts": counts}


def panel(folder: Path, *, as_objects: bool) -> Path:
    np.save(folder / "genes_x.npy", np.array(GENES, dtype=object if as_objects else None))
    return folder / "genes_x.npy"


def panel_by_numpy(path: Path) -> object:
    return np.load(path).tolist()


class _OnlyArrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        assert module.startswith("numpy") and name in ("ndarray", "dtype", "_reconstruct"), name
        return super().find_class(module, name)


def panel_by_pickle(path: Path) -> object:
    with open(path, "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        np.lib.format.read_array_header_1_0(file)
        return _OnlyArrays(file).load().tolist()


def cache(folder: Path, *, kind: str, is_earlier: bool = False) -> Path:
    shape = {"target": (7,), "neighbor": (9, 7), "token": (2, 3, 7), "patch": (4, 4, 3)}[kind]
    dtype = {"token": "float16", "patch": "uint8"}.get(kind, "float32")
    identity = CacheIdentity(
        kind=kind,
        encoder="uni",
        encoder_sha256="0" * 64,
        image_size=(700, 600),
        image_fingerprint="f",
        patch_size=4,
        microns_per_pixel=0.5,
        num_neighbors=3,
        views=2,
        dtype=dtype,
    )
    values = np.random.default_rng(1).integers(0, 255, (len(SPOTS), *shape)).astype(dtype)
    write_cache(folder / "A1.h5", identity, SPOTS, PIXELS.astype(np.int64), [values])
    if is_earlier:
        as_earlier(folder / "A1.h5")
    return folder / "A1.h5"


_IDENTITY = (
    *("kind", "encoder", "encoder_sha256", "image_size", "image_fingerprint", "patch_size", "microns_per_pixel"),
    *("num_neighbors", "views", "dtype", "token_pool", "precision"),
)


def cache_of(path: Path) -> object:
    with opened(path) as found:
        identity = {name: getattr(found.identity, name) for name in _IDENTITY}
        values = found.read()
        if identity["kind"] == "token":
            with BlockStore([path], "token") as store:
                rows = np.arange(len(values)).repeat(2)
                again = store.read(rows, np.tile([0, 1], len(values))).numpy()
                assert np.array_equal(again.reshape(values.shape), values)
        return {"identity": identity, "spots": found.spot_ids, "centers": found.centers, "values": values}


def cache_by_h5py(path: Path) -> object:
    with h5py.File(path) as file:
        identity = {name: file.attrs[name] for name in _IDENTITY}
        identity["image_size"] = [int(length) for length in identity["image_size"]]
        if np.isnan(identity["microns_per_pixel"]):
            identity["microns_per_pixel"] = None
        values = file[{"token": "tokens", "patch": "patches"}.get(identity["kind"], "features")][:]
        spots = [str(name) for name in file["spot_id"].asstr()[:]]
        return {"identity": identity, "spots": spots, "centers": file["coords"][:], "values": values}


def published(folder: Path, *, is_zip: bool = True) -> Path:
    values = torch.rand(len(SPOTS), 7, generator=torch.Generator().manual_seed(0))
    torch.save(values, folder / "A1.pt", _use_new_zipfile_serialization=is_zip)
    return folder / "A1.pt"


def published_of(path: Path) -> object:
    assert verify_published(path, len(SPOTS)) == (len(SPOTS), 7)
    return read_published(path, len(SPOTS))


def by_torch(path: Path) -> object:
    return torch.load(path, weights_only=True)


def checkpoint(folder: Path, *, name: str) -> Path:
    optimization = OptimizationState({"state": {0: {"step": torch.ones(3)}}}, {"last_epoch": 3}, {})
    save_checkpoint(folder / name, fabricated_fold(optimization=optimization if name == "last.pt" else None))
    return folder / name


def checkpoint_of(path: Path) -> object:
    fold = load_checkpoint(path, memory_map=path.name == "best.pt")
    check_tensors(path, fold.weights)
    return fold.to_dict()


def state_dict(folder: Path) -> Path:
    torch.save({"state_dict": {"fc.weight": torch.arange(12.0).view(3, 4), "fc.bias": torch.ones(3)}}, folder / "w.pt")
    return folder / "w.pt"


def state_dict_of(path: Path) -> object:
    return dict(_state_dict(load_tensors(path), str(path)))


def tensors(folder: Path, *, name: str) -> Path:
    import safetensors.torch

    weights = {"fc.weight": torch.arange(12.0).view(3, 4), "fc.bias": torch.ones(3)}
    save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
    save(weights, folder / name)
    return folder / name


def tensors_by_hand(path: Path) -> object:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    kinds = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64, "U32": np.uint32}
    found = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = np.frombuffer(content[start + first : start + last], kinds[entry["dtype"]])
            found[name] = values.reshape(entry["shape"])
    return found


def space_ranger_h5(folder: Path, *, version: int) -> Path:
    stored = sparse.csr_matrix(COUNTS)
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(stored, name)
        group["shape"], group["barcodes"] = np.array(COUNTS.T.shape), np.array(BARCODES, dtype="S")
        names = group.create_group("features") if version == 3 else group
        names["id" if version == 3 else "genes"] = np.array(IDS, dtype="S")
        names["name" if version == 3 else "gene_names"] = np.array(GENES, dtype="S")
        if version == 3:
            names["feature_type"] = np.array(["Gene Expression"] * len(IDS), dtype="S")
    return folder / "filtered_feature_bc_matrix.h5"


def matrix_of(path: Path) -> object:
    found = read_matrix(files_below(path.parent), path.parent, "a matrix")
    return {"barcodes": found.barcodes, "ids": found.ids, "symbols": found.symbols, "counts": found.matrix.toarray()}


def matrix_by_h5py(path: Path) -> object:
    with h5py.File(path) as file:
        group = file["matrix"] if "matrix" in file else next(iter(file.values()))
        parts = group.get("features", group)
        ids, symbols = (parts[new if new in parts else old] for new, old in (("id", "genes"), ("name", "gene_names")))
        names = {"barcodes": group["barcodes"], "ids": ids, "symbols": symbols}
        lists = {name: [entry.decode() for entry in found[:]] for name, found in names.items()}
        counts = dense(group, (len(lists["barcodes"]), len(lists["ids"])))
        if "feature_type" in parts:
            keep = [i for i, kind in enumerate(parts["feature_type"][:]) if kind == b"Gene Expression"]
            lists |= {name: [lists[name][i] for i in keep] for name in ("ids", "symbols")}
            counts = counts[:, keep]
    return {**lists, "counts": counts}


def matrix_market(folder: Path, *, damaged: str) -> Path:
    """The three files of a matrix in a folder; the one of the name `damaged` is."""
    stored = sparse.coo_matrix(COUNTS.T)
    head = f"%%MatrixMarket matrix coordinate integer general\n%made here\n{len(GENES)} {len(SPOTS)} {stored.nnz}\n"
    texts = {
        "matrix.mtx": head + "".join(f"{r + 1} {c + 1} {v}\n" for r, c, v in zip(stored.row, stored.col, stored.data)),
        "barcodes.tsv": "".join(f"{barcode}\n" for barcode in BARCODES),
        "features.tsv": "".join(f"{i}\t{gene}\tGene Expression\n" for i, gene in zip(IDS, GENES)),
    }
    for name, text in texts.items():
        name = damaged if name == damaged.removesuffix(".gz") else name
        (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode())
    return folder / damaged


def matrix_by_lines(path: Path) -> object:
    files = {file.name.removesuffix(".gz"): text_of(file) for file in path.parent.iterdir()}
    strip = {name: [line.strip() for line in text.rstrip().split("\n")] for name, text in files.items()}
    entries = [line for line in strip["matrix.mtx"] if line and not line.startswith("%")]
    rows = [[cell.strip().strip('"') for cell in line.strip('"').split("\t")] for line in strip["features.tsv"]]
    keep = [i for i, row in enumerate(rows) if len(row) < 3 or row[2] == "Gene Expression"]
    barcodes = [line.split("\t")[0].strip().strip('"') for line in strip["barcodes.tsv"]]
    counts = np.zeros((len(barcodes), len(rows)))
    for gene, barcode, count in (line.split() for line in entries[1:]):
        counts[int(barcode) - 1, int(gene) - 1] += float(count)
    ids, symbols = [rows[i][0] for i in keep], [rows[i][min(1, len(rows[i]) - 1)] for i in keep]
    return {"barcodes": barcodes, "ids": ids, "symbols": symbols, "counts": counts[:, keep]}


def hest_h5ad(folder: Path) -> Path:
    places = np.array([spot.split("x") for spot in SPOTS], dtype=np.int64)
    obs = pd.DataFrame(
        {"in_tissue": [1] * 8 + [0], "array_col": places[:, 0], "array_row": places[:, 1]}, index=BARCODES
    )
    data = anndata.AnnData(sparse.csr_matrix(COUNTS.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))
    data.obsm["spatial"] = PIXELS
    data.write_h5ad(folder / "S1.h5ad")
    return folder / "S1.h5ad"


def sample_of(path: Path) -> HestSample:
    return HestSample("S1", "P", path, None, None, 0.5, (700, 600), "Homo sapiens")


def hest_of(path: Path) -> object:
    found = read_expression(sample_of(path))
    names = {"spots": found.counts.obs_names.tolist(), "genes": found.counts.var_names.tolist()}
    table = found.spots[["x", "y", "pixel_x", "pixel_y"]].to_numpy(np.float64)
    return {**names, "barcodes": found.spots["barcode"].tolist(), "counts": found.counts.X.toarray(), "table": table}


def hest_by_h5py(path: Path) -> object:
    with h5py.File(path) as file:
        barcodes, genes = names_in(file, "obs"), names_in(file, "var")
        grid = np.stack([file["obs/array_col"][:], file["obs/array_row"][:]], axis=1)
        keep = file["obs/in_tissue"][:] == 1
        counts, pixels = dense(file["X"], (len(barcodes), len(genes))), file["obsm/spatial"][:]
    places = as_on_image(grid[keep], pixels[keep])
    return {
        "spots": [f"{x}x{y}" for x, y in places.tolist()],
        "genes": genes,
        "barcodes": [name for name, kept in zip(barcodes, keep) if kept],
        "counts": counts[keep],
        "table": np.concatenate([places, pixels[keep]], axis=1),
    }


def hest_patches(folder: Path) -> Path:
    with h5py.File(folder / "S1.h5", "w") as file:
        file["img"] = np.random.default_rng(2).integers(0, 255, (len(SPOTS), 8, 8, 3)).astype(np.uint8)
        file["coords"] = np.floor(PIXELS - 4).astype(np.int64)
        file["barcode"] = np.array([[barcode.encode()] for barcode in BARCODES])
    return folder / "S1.h5"


def patches_of(path: Path) -> object:
    found = HestPatches(sample_of(path), path)
    return {
        "names": found.barcodes,
        "corners": found.corners,
        "img": np.concatenate(list(found.blocks(found.barcodes))),
    }


def patches_by_h5py(path: Path) -> object:
    with h5py.File(path) as file:
        names = [name.decode() for name in file["barcode"][:].ravel()]
        return {"names": names, "corners": file["coords"][:], "img": file["img"][:]}


def _kinds(
    make: Callable[..., Path], read: Callable[[Path], object], *oracles: Callable[[Path], object]
) -> list[Reader]:
    kinds = ("target", "neighbor", "token", "patch")
    is_earlier = bool(oracles)
    title = "cache without a seal" if is_earlier else "cache"
    return [Reader(f"{title}, {k}", partial(make, kind=k, is_earlier=is_earlier), read, oracles) for k in kinds]


def _matrix_market(damaged: str) -> Reader:
    make = partial(matrix_market, damaged=damaged)
    return Reader(f"Space Ranger {damaged}", make, matrix_of, (matrix_by_lines,), True, damaged.endswith(".gz"))


_FACTORS = json.dumps({"tissue_hires_scalef": 0.25, "spot_diameter_fullres": 65.5, "fiducial_diameter_fullres": 90})
READERS = [
    Reader("counts .parquet", our_parquet, counts_of, (counts_by_arrow,)),
    Reader("counts .parquet of pandas", pandas_parquet, counts_of, (counts_by_arrow,)),
    Reader("counts .h5ad", h5ad, counts_of, (counts_by_h5py,)),
    Reader("panel .npy", partial(panel, as_objects=False), load_names, (panel_by_numpy,)),
    Reader("panel .npy of objects", partial(panel, as_objects=True), load_names, (panel_by_pickle,)),
    *_kinds(cache, cache_of),
    *_kinds(cache, cache_of, cache_by_h5py),
    Reader("published features", published, published_of),
    Reader("published features, no zip", partial(published, is_zip=False), published_of, (by_torch,)),
    Reader("best.pt", partial(checkpoint, name="best.pt"), checkpoint_of),
    Reader("last.pt", partial(checkpoint, name="last.pt"), checkpoint_of),
    Reader("published state dict", state_dict, state_dict_of),
    Reader("weights .pt", partial(tensors, name="w.pt"), read_weights),
    Reader("weights .safetensors", partial(tensors, name="w.safetensors"), read_weights, (tensors_by_hand,)),
    Reader("Space Ranger .h5, version 2", partial(space_ranger_h5, version=2), matrix_of, (matrix_by_h5py,)),
    Reader("Space Ranger .h5, version 3", partial(space_ranger_h5, version=3), matrix_of, (matrix_by_h5py,)),
    *map(_matrix_market, ("matrix.mtx", "matrix.mtx.gz", "features.tsv", "barcodes.tsv.gz")),
    Reader(
        "scale factors", written("scalefactors_json.json", _FACTORS), read_scale_factors, (scale_factors_by_json,), True
    ),
    Reader("HEST .h5ad", hest_h5ad, hest_of, (hest_by_h5py,)),
    Reader("HEST patches", hest_patches, patches_of, (patches_by_h5py,)),
]
