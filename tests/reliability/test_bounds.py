"""Bounds: what a file claims is compared with what it is before it is taken; nothing crashes, hangs or fills the memory."""

from __future__ import annotations

import fcntl
import gzip
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from datasets.tables.counts import gene_names, read_counts
from datasets.tables.positions import read_positions
from datasets.tables.spot_table import read_spots
from preprocess.raw.files import place_file
from preprocess.raw.gene_map import read_gene_map
from tests.command_line import call_main
from utils.untrusted import text


@pytest.fixture
def h5ad(tmp_path) -> Path:
    counts = sparse.csr_matrix(np.ones((300, 40), np.float32))
    obs, var = pd.DataFrame(index=[f"{i}x1" for i in range(300)]), pd.DataFrame(index=[f"GENE{i}" for i in range(40)])
    anndata.AnnData(counts, obs=obs, var=var).write_h5ad(tmp_path / "A1.h5ad")
    return tmp_path / "A1.h5ad"


@pytest.mark.parametrize("bytes_more", [1, -1, -4000])
def test_a_byte_too_many_or_too_few_is_noticed(h5ad, bytes_more):
    content = h5ad.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes(max(bytes_more, 0)) + content[middle + max(-bytes_more, 0) :]
    h5ad.write_bytes(changed)
    with pytest.raises(ValueError, match=r"A1\.h5ad cannot be read.*(it is truncated|bytes were inserted or appended)"):
        read_counts(h5ad)


def test_a_locked_file_is_not_called_damaged(h5ad):
    with open(h5ad, "rb+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"it is locked \(in use by another process.*HDF5_USE_FILE_LOCKING"):
            read_counts(h5ad)
    assert read_counts(h5ad).n_obs == 300


def test_text_that_unpacks_to_more_than_a_table_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_BYTES", 10_000)
    path = tmp_path / "s.tsv.gz"
    path.write_bytes(gzip.compress(b"\tA\n" + b"1x1\t0\n" * 10_000))
    for read in (read_counts, read_spots, read_positions):
        with pytest.raises(ValueError, match=r"s\.tsv\.gz cannot be read as .*it holds more than 10,000 bytes"):
            read(path)


def test_a_line_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 1000)
    path = tmp_path / "s.tsv"
    path.write_bytes(b"A\t" * 2000)
    for read in (read_counts, gene_names, read_spots, read_positions):
        with pytest.raises(ValueError, match=r"s\.tsv cannot be read as .*longer than 1,000 characters"):
            read(path)


@pytest.mark.parametrize("read", [read_counts, gene_names, read_spots, read_positions])
def test_damage_in_a_compressed_table_is_an_error_with_its_name(tmp_path, read):
    path = tmp_path / "s.tsv.gz"
    content = bytearray(gzip.compress(("\tA\n" + "".join(f"{i}x1\t{i * 7919 % 1000}\n" for i in range(999))).encode()))
    content[15:17] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"s\.tsv\.gz cannot be read as "):
        read(path)


def test_damage_in_a_compressed_gene_map_or_a_file_to_be_copied_is_an_error_with_its_name(tmp_path):
    path, target = tmp_path / "map.tsv.gz", tmp_path / "map.tsv"
    content = bytearray(gzip.compress("".join(f"ENSG{i:011d}\tGENE{i * 7919}\n" for i in range(999)).encode()))
    content[15:17] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"map\.tsv\.gz cannot be read as a table of genes"):
        read_gene_map(path)
    with pytest.raises(ValueError, match=r"map\.tsv\.gz cannot be read as a file to copy.*Download it again"):
        place_file(path, target, overwrite=False)
    assert not target.exists()


def test_a_model_larger_than_any_memory(tiny_run):
    left = call_main(
        *("--mode", "train", "--config_name", tiny_run.config_name, "--data_dir", tiny_run.data_dir, "--device", "cpu"),
        *("--log_path", tiny_run.path.parent / "large", "--set", f"MODEL.fusion_mlp_dim={10**11}"),
    )
    assert left.status == 2 and "MODEL.fusion_mlp_dim" in left.said and "Traceback" not in left.said, left.said


@pytest.mark.parametrize("character", ["\0", "\x1c", "\x0c", "\x1b"])
def test_control_characters_are_no_part_of_a_table(tmp_path, character):
    path = tmp_path / "s.tsv"
    path.write_text(f"\tA\n1x1\t1\n2x1\t{character}1\n")
    message = rf"s\.tsv cannot be read as .*line 3 holds the control character {ord(character):#04x}"
    for read in (read_counts, read_spots, read_positions):
        with pytest.raises(ValueError, match=message):
            read(path)
