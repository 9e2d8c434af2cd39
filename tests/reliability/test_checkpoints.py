"""PyTorch files: their checksums are verified, and what they hold is of the kind that is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.checkpoint import load_checkpoint, load_weights
from utils.untrusted.tensors import check_tensors, load_tensors

EARLIER = Path(__file__).resolve().parents[1] / "data" / "earlier_run"


def flipped(path: Path, record: str) -> None:
    """One bit of a record of a PyTorch file is flipped; nothing else changes."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(record))
        content = archive.read(info)
    whole = bytearray(path.read_bytes())
    place = whole.index(content, info.header_offset) + len(content) // 2
    whole[place] ^= 0x40
    path.write_bytes(whole)


def saved(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    torch.save({"model": {"large": torch.rand(600, 1000, generator=generator), "small": torch.rand(3)}}, path)
    return path


@pytest.mark.parametrize(("record", "memory_map"), [("data/0", False), ("data/1", False), ("data/1", True)])
def test_one_flipped_bit_is_found(record, memory_map, tmp_path):
    path = saved(tmp_path / "best.pt")
    load_tensors(path, memory_map=memory_map)
    flipped(path, record)
    with pytest.raises(ValueError, match=r"best\.pt cannot be read as a PyTorch file: BadZipFile: Bad CRC-32 for file"):
        load_tensors(path, memory_map=memory_map)


def test_what_was_left_on_disk_is_verified_when_it_is_used(tmp_path):
    path = saved(tmp_path / "best.pt")
    flipped(path, "data/0")
    content = load_tensors(path, memory_map=True)
    with pytest.raises(ValueError, match=r"best\.pt .*Bad CRC-32"):
        check_tensors(path, content["model"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_themselves(value, tmp_path):
    model, path = nn.Linear(4, 2), tmp_path / "best.pt"
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["weight"][1, 2] = value
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"best\.pt: 1 of the 8 numbers of weight are not finite"):
        load_weights(model, weights, path)


def test_compressed_records_are_no_file_of_pytorch(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, zipfile.ZipFile(tmp_path / "b.pt", "w") as packed:
        for record in whole.infolist():
            packed.writestr(record.filename, whole.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"b\.pt cannot be read .* is compressed"):
        load_tensors(tmp_path / "b.pt")


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.eye(3, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_are_no_plain_arrays(tensor, tmp_path):
    torch.save({"features": [tensor]}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt cannot be read as a PyTorch file: "):
        load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": torch.ones(2)}, "has checkpoint schema"),
        ({"schema": True}, "has checkpoint schema True"),
        ({"config": 2}, "config should be a dict, found 2"),
        ({"genes": 3}, "genes should be a list, found 3"),
        ({"genes": [1, 2]}, "genes should hold strs only, found 1"),
        ({"model": {"a": 1}}, "model should hold Tensors only, found 1"),
        ({"progress": 3}, "progress should be a dict, found 3"),
        ({"epoch": True}, "epoch should be a int, found True"),
        ({"config": {"LOSS": {"k": "many"}}}, "LOSS.k should be a whole number"),
        ({"encoder": {"name": "uni"}}, "lacks sha256"),
    ],
)
def test_every_part_of_a_checkpoint_is_of_its_kind(change, text, tmp_path):
    path = tmp_path / "best.pt"
    content = torch.load(next(EARLIER.rglob("best.pt")), weights_only=True)
    torch.save(content, path)
    load_checkpoint(path)
    torch.save({**content, **change}, path)
    with pytest.raises(ValueError, match=r"best\.pt") as caught:
        load_checkpoint(path)
    assert text in str(caught.value)


def test_every_cut_of_a_checkpoint_is_a_clean_error(tmp_path):
    content = next(EARLIER.rglob("best.pt")).read_bytes()
    path = tmp_path / "best.pt"
    for length in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"best\.pt"):
            load_checkpoint(path)
