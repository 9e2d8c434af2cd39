"""Streaming features of spots against a slow version, with an encoder whose features can be computed by hand."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets.features.encoding import EncodingPlan, encode_slide
from datasets.features.patch_encoder import BatchedPatchEncoder, pool_tokens
from datasets.images.geometry import dihedral_view, neighbor_corners, neighbor_validity
from datasets.images.slides import open_slide
from datasets.images.tiles import Band

CPU = torch.device("cpu")
SIZE, WIDTH, HEIGHT = 16, 230, 210


@dataclass
class Encoded:
    tokens: Tensor
    pooled: Tensor


class MeanColour:
    """Tokens: one of ones, then the mean colours of a 4 x 4 grid; pooled: the mean colour. Counts its images."""

    def __init__(self):
        self.num_images = 0

    def __call__(self, images: Tensor) -> Encoded:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, SIZE, SIZE)
        self.num_images += len(images)
        values = images.float()
        grid = values.reshape(-1, 3, 4, SIZE // 4, 4, SIZE // 4).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.ones(len(images), 1, 3, device=images.device), grid], dim=1)
        return Encoded(tokens, values.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def slide(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png") as opened:
        yield opened


@pytest.fixture(scope="module")
def centers() -> np.ndarray:
    """Spots all over the image, its corners and edges among them."""
    inside = np.random.default_rng(1).integers(0, min(WIDTH, HEIGHT), size=(30, 2))
    return np.concatenate([inside, [[0, 0], [WIDTH - 1, HEIGHT - 1], [115, 3], [3, 100], [115, 105]]])


BORDER = 3 * SIZE


def _crop(padded: np.ndarray, x: int, y: int) -> np.ndarray:
    """The tile whose top left corner is (x, y) of the picture within the border."""
    return padded[y + BORDER : y + BORDER + SIZE, x + BORDER : x + BORDER + SIZE]


def _slow(picture: np.ndarray, centers: np.ndarray, views: int) -> dict[str, np.ndarray]:
    """One patch, one tile, one view at a time, cut from a copy with a wide white border."""
    picture = np.pad(picture, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), constant_values=255)
    is_valid = neighbor_validity(centers, (WIDTH, HEIGHT), SIZE)
    patch_encoder = MeanColour()
    result = {"target": [], "neighbor": [], "token": [], "patch": []}
    for (x, y), valid in zip(centers, is_valid):
        patch = _crop(picture, x - SIZE // 2, y - SIZE // 2)
        image = torch.from_numpy(patch.copy()).permute(2, 0, 1)[None]
        result["patch"].append(patch)
        result["target"].append(patch_encoder(image).pooled[0].numpy())
        result["token"].append(
            np.stack([patch_encoder(dihedral_view(image, view)).tokens[0].numpy() for view in range(views)])
        )
        tiles = np.zeros((25, 3), dtype=np.float32)
        for tile in np.flatnonzero(valid):
            row, column = divmod(tile, 5)
            crop = _crop(picture, x - SIZE // 2 + SIZE * (column - 2), y - SIZE // 2 + SIZE * (row - 2))
            tiles[tile] = crop.reshape(-1, 3).mean(axis=0)
        result["neighbor"].append(tiles)
    return {kind: np.stack(values) for kind, values in result.items()}


def _distinct_tiles(centers: np.ndarray) -> int:
    is_valid = neighbor_validity(centers, (WIDTH, HEIGHT), SIZE)
    return len({tuple(corner) for corner in neighbor_corners(centers, SIZE)[is_valid].tolist()})


def _grid(pitch: float) -> np.ndarray:
    """Spots over the whole picture, row by row; those at the edges have patches that leave it."""
    y, x = np.meshgrid(np.arange(0, HEIGHT, pitch), np.arange(3, WIDTH, pitch), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64)


def _encode(
    slide, centers, plan: EncodingPlan, batch_size: int, patch_encoder=None, **options
) -> dict[str, np.ndarray]:
    encoder = BatchedPatchEncoder(patch_encoder or MeanColour(), CPU, prefix_tokens=1, batch_size=batch_size)
    batches, expected_start = [], 0
    for batch in encode_slide(slide, centers, encoder, plan, **options):
        assert batch.rows.start == expected_start
        expected_start = batch.rows.stop
        batches.append(batch)
    assert expected_start == len(centers)
    return {kind: np.concatenate([getattr(batch, kind) for batch in batches]) for kind in plan.kinds}


@pytest.mark.parametrize("kinds", [("target",), ("neighbor",), ("token",), ("patch",), ("target", "neighbor", "token")])
@pytest.mark.parametrize("batch_size", [1, 30, 500])
def test_features_belong_to_their_spots(slide, picture, centers, kinds, batch_size):
    plan = EncodingPlan(kinds, patch_size=SIZE, views=8, token_dtype=torch.float32)
    got = _encode(slide, centers, plan, batch_size, num_workers=3)
    slow = _slow(picture, centers, 8)
    for kind in kinds:
        assert got[kind].shape == slow[kind].shape
        np.testing.assert_allclose(got[kind], slow[kind], rtol=1e-5, atol=1e-4, err_msg=kind)


def test_the_order_of_spots_is_the_order_of_features(slide, centers):
    plan = EncodingPlan(("target", "neighbor", "token"), patch_size=SIZE, views=2)
    order = np.random.default_rng(3).permutation(len(centers))
    straight, permuted = (_encode(slide, chosen, plan, 90) for chosen in (centers, centers[order]))
    for kind in plan.kinds:
        np.testing.assert_allclose(permuted[kind], straight[kind][order], rtol=1e-5, err_msg=kind)


def test_the_patch_is_the_middle_tile_and_is_encoded_once(slide, centers):
    patch_encoder = MeanColour()
    plan = EncodingPlan(("target", "neighbor", "token"), patch_size=SIZE, views=4, token_dtype=torch.float32)
    got = _encode(slide, centers, plan, 64, patch_encoder)
    assert np.array_equal(got["neighbor"][:, 12], got["target"])
    alone = _encode(slide, centers, EncodingPlan(("target",), patch_size=SIZE), 64)
    np.testing.assert_allclose(alone["target"], got["target"], rtol=1e-6)
    is_valid = neighbor_validity(centers, slide.size, SIZE)
    assert patch_encoder.num_images == _distinct_tiles(centers) + 3 * len(centers), (
        "valid tiles, and three more views of the patch"
    )
    assert not got["neighbor"][~is_valid].any() and got["neighbor"][is_valid].all()


@pytest.mark.parametrize("pitch", [SIZE, SIZE // 2, 2 * SIZE, SIZE + 1, 1.5 * SIZE])
def test_every_tile_is_encoded_once_on_any_grid(slide, picture, pitch):
    grid = _grid(pitch)
    grid = grid if pitch == SIZE or len(grid) < 100 else np.concatenate([grid[:60], grid[-30:]])
    if pitch == SIZE:
        assert _distinct_tiles(grid) < 1.1 * len(grid)
    is_valid = neighbor_validity(grid, slide.size, SIZE)
    assert (_distinct_tiles(grid) == is_valid.sum()) == (pitch == SIZE + 1), "nothing to share, one pixel off"
    slow = _slow(picture, grid, 4)
    random = np.random.default_rng(5)
    for order in (np.arange(len(grid)), random.permutation(len(grid)), np.sort(random.permutation(len(grid))[:40])):
        for views in (0, 1, 4):
            kinds = ("target", "neighbor", "token", "patch") if views else ("target", "neighbor")
            patch_encoder = MeanColour()
            plan = EncodingPlan(kinds, patch_size=SIZE, views=views or 1, token_dtype=torch.float32)
            got = _encode(slide, grid[order], plan, 32, patch_encoder)
            for kind in kinds:
                expected = slow[kind][order, :views] if kind == "token" else slow[kind][order]
                np.testing.assert_allclose(got[kind], expected, rtol=1e-5, atol=1e-4, err_msg=kind)
            again = max(0, views - 1) * len(order)
            assert patch_encoder.num_images == _distinct_tiles(grid[order]) + again


@pytest.mark.parametrize("views", [1, 4])
def test_tokens_that_would_wait_too_long_are_encoded_again(slide, picture, monkeypatch, views):
    """Bounded memory in any order: a patch met long before its spot gives pooled features first and tokens in its turn."""
    centers = np.random.default_rng(7).permutation(np.concatenate([_grid(SIZE)[:90], _grid(SIZE)[5:9]]))
    plan = EncodingPlan(("target", "neighbor", "token"), patch_size=SIZE, views=views, token_dtype=torch.float32)
    slow, counts = _slow(picture, centers, views), []
    for longest in (0, 20, 1000):
        monkeypatch.setattr("datasets.features.encoding._WAITING_PIXELS", longest * SIZE**2)
        patch_encoder = MeanColour()
        got = _encode(slide, centers, plan, 16, patch_encoder)
        for kind in plan.kinds:
            np.testing.assert_allclose(got[kind], slow[kind], rtol=1e-5, atol=1e-4, err_msg=kind)
        counts.append(patch_encoder.num_images)
    least = _distinct_tiles(centers) + (views - 1) * len(centers)
    assert least == counts[2] < counts[1] < counts[0] <= least + len(centers)


def test_a_band_of_rows_is_held_whatever_the_height_of_the_slide(tmp_path, monkeypatch):
    """Pooled features and waiting tokens: as many at most for ten times as many rows."""
    held = []

    class Watched(Band):
        def drop(self, below: int) -> None:
            held.append(self._stop - self._first)
            super().drop(below)

    monkeypatch.setattr("datasets.features.encoding.Band", Watched)
    most = []
    for rows in (12, 120):
        Image.new("RGB", (10 * SIZE, rows * SIZE)).save(tmp_path / "strip.png")
        y, x = np.divmod(np.arange(10 * rows), 10)
        held.clear()
        with open_slide(tmp_path / "strip.png") as strip:
            centers = np.stack([x, y], axis=1) * SIZE + SIZE // 2
            _encode(strip, centers, EncodingPlan(("neighbor", "token"), patch_size=SIZE, views=1), 8)
        most.append(max(held))
    assert most[0] == most[1] <= 7 * 10


def test_a_patch_may_cover_more_pixels_than_the_encoder_sees(tmp_path):
    """Blocks of one colour, 32 px each, seen at half the resolution."""
    colours = np.random.default_rng(4).integers(0, 256, size=(12, 12, 3), dtype=np.uint8)
    Image.fromarray(colours.repeat(32, axis=0).repeat(32, axis=1)).save(tmp_path / "blocks.png")
    plan = EncodingPlan(("target", "neighbor"), patch_size=SIZE, source_size=32)
    centers = np.array([[32 * 5 + 16, 32 * 6 + 16], [16, 16]])
    with open_slide(tmp_path / "blocks.png") as slide:
        got = _encode(slide, centers, plan, 50)
    np.testing.assert_allclose(got["target"], [colours[6, 5], colours[0, 0]], atol=8)
    np.testing.assert_allclose(got["neighbor"][0].reshape(5, 5, 3), colours[4:9, 3:8], atol=8)
    assert (got["neighbor"][1].reshape(5, 5, 3)[:2] == 0).all(), "validity is counted in the pixels that are covered"


def test_pooled_tokens_are_means_of_blocks():
    tokens = torch.rand(3, 2 + 16, 5)
    pooled = pool_tokens(tokens, prefix_tokens=2, factor=2)
    grid = tokens[:, 2:].reshape(3, 4, 4, 5)
    slow = [grid[:, row : row + 2, column : column + 2].mean(dim=(1, 2)) for row in (0, 2) for column in (0, 2)]
    assert torch.equal(pooled[:, :2], tokens[:, :2])
    torch.testing.assert_close(pooled[:, 2:], torch.stack(slow, dim=1))
    assert pool_tokens(tokens, 2, 1) is tokens
    with pytest.raises(
        ValueError, match="--token_pool 3 does not divide the 4 x 4 grid of patch tokens; possible: 1, 2, 4"
    ):
        pool_tokens(tokens, 2, 3)


def test_numbers_that_are_not_finite_are_refused(slide, centers):
    def broken(images: Tensor) -> Encoded:
        encoded = MeanColour()(images)
        return Encoded(encoded.tokens * torch.inf, encoded.pooled)

    plan = EncodingPlan(("token",), patch_size=SIZE, views=1)
    with pytest.raises(ValueError, match=r"not finite.*spots 0 to 9 .*--precision float32"):
        _encode(slide, centers, plan, 10, broken)
    large = EncodingPlan(("token",), patch_size=SIZE, views=1, token_dtype=torch.float16)
    with pytest.raises(ValueError, match="too large for their type"):
        _encode(
            slide, centers, large, 10, lambda images: Encoded(MeanColour()(images).tokens * 1e4, images[:, :, 0, 0])
        )


def test_errors_of_the_image_reach_the_caller(tmp_path, picture, centers):
    Image.fromarray(picture).save(tmp_path / "whole.jpg", quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:20000])
    with open_slide(tmp_path / "cut.jpg") as slide, pytest.raises(ValueError, match=r"cut\.jpg.*truncated"):
        _encode(slide, centers, EncodingPlan(("target",), patch_size=SIZE), 4)


def test_wrong_plans_are_refused():
    with pytest.raises(ValueError, match="found targets"):
        EncodingPlan(("targets",))
    with pytest.raises(ValueError, match="found 3"):
        EncodingPlan(("token",), views=3)
    with pytest.raises(ValueError, match="found 'half'"):
        BatchedPatchEncoder(MeanColour(), CPU, precision="half")


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc to see the memory in use")
def test_memory_does_not_grow_with_the_number_of_spots(slide):
    """4 000 spots: their regions alone would take 77 MB, and a list of results as the encoder's input far more."""
    centers = np.random.default_rng(6).integers(0, 200, size=(4000, 2))
    encoder = BatchedPatchEncoder(MeanColour(), CPU, batch_size=100)
    plan = EncodingPlan(("neighbor",), patch_size=SIZE)
    before, peak, spots = None, 0, 0
    for batch in encode_slide(slide, centers, encoder, plan, num_workers=1):
        spots += len(batch.neighbor)
        if before is None and spots > 100:
            before = _resident_bytes()
        peak = max(peak, _resident_bytes())
    assert spots == 4000
    assert peak - before < 20e6


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_cuda_gives_what_the_cpu_gives(slide, centers, precision):
    device = torch.device("cuda")
    plan = EncodingPlan(("target", "neighbor", "token", "patch"), patch_size=SIZE, token_dtype=torch.float32)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 40)

    def patch_encoder(images: Tensor) -> Encoded:
        encoded = MeanColour()(images)
        on = layer.to(images.device)
        return Encoded(on(encoded.tokens / 255), on(encoded.pooled / 255))

    def all_batches(on: torch.device, precision: str) -> list:
        encoder = BatchedPatchEncoder(patch_encoder, on, batch_size=70, precision=precision)
        return list(encode_slide(slide, centers, encoder, plan))

    expected = all_batches(CPU, "float32")
    for want, got in zip(expected, all_batches(device, precision), strict=True):
        assert np.array_equal(want.patch, got.patch)
        for kind in ("target", "neighbor", "token"):
            np.testing.assert_allclose(
                getattr(got, kind), getattr(want, kind), atol=1e-5 if precision == "float32" else 0.02
            )
