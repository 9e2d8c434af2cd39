"""Files are published whole or not at all, and files from elsewhere cannot run code."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from utils.files import load_names, require_file, safe_name, sha256, write_atomically, write_text
from utils.untrusted.tensors import load_tensors


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_write_makes_folders_and_keeps_the_suffix(tmp_path):
    seen = []
    write_atomically(tmp_path / "x" / "b.h5ad", lambda t: (seen.append(t.suffix), t.write_bytes(b"1")))
    assert seen == [".h5ad"] and (tmp_path / "x" / "b.h5ad").read_bytes() == b"1"


def test_sha256_is_that_of_the_standard_library(tmp_path):
    import hashlib

    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_require_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5 does not exist\. Run X"):
        require_file(tmp_path / "none.h5", "Run X")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch gene_dml_evil_was_here",))


def test_tensors_are_read_by_the_safe_loader(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    assert torch.equal(load_tensors(tmp_path / "good.pt")["a"], torch.ones(2))
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not trusted to run code"):
        load_tensors(tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        load_tensors(tmp_path / "cut.pt")


def test_names_from_plain_and_from_published_object_arrays(tmp_path):
    names = ["GNAS", "ERBB2", "ACTG1"]
    np.save(tmp_path / "plain.npy", np.array(names))
    np.save(tmp_path / "object.npy", np.array(names, dtype=object), allow_pickle=True)
    assert load_names(tmp_path / "plain.npy") == names
    assert load_names(tmp_path / "object.npy") == names


@pytest.mark.parametrize("content", ["evil", "numbers", "empty", "cut", "list"])
def test_arrays_that_are_no_names_are_refused(tmp_path, content):
    path = tmp_path / "genes.npy"
    if content == "evil":
        np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)
    elif content == "numbers":
        np.save(path, np.arange(3))
    elif content == "empty":
        np.save(path, np.array([], dtype=str))
    elif content == "cut":
        np.save(path, np.array(["A"] * 100, dtype=object), allow_pickle=True)
        path.write_bytes(path.read_bytes()[:150])
    else:
        path.write_bytes(pickle.dumps(["A"]))
    with pytest.raises(ValueError, match=r"genes\.npy"):
        load_names(path)
    assert not os.path.exists("gene_dml_evil_was_here")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", "..", ".hidden"])
def test_names_cannot_leave_the_data_folder(name):
    with pytest.raises(ValueError, match=r"Slide .* is not a plain name"):
        safe_name(name, "Slide")
