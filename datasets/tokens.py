"""Where the target tokens of a batch come from: the token cache, or uint8 patches for the frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from datasets.batches import goes_to_device
from datasets.features.block_store import BlockStore
from datasets.features.cache import read_features
from datasets.features.identity import UNKNOWN, CacheIdentity
from datasets.features.places import find_cache
from datasets.features.verify import expected_size, verify_cache
from datasets.images.geometry import NUM_VIEWS, dihedral_views, patch_corner
from datasets.images.slides import open_slide
from datasets.layout import Layout
from datasets.spots import SlideRecord, SpotStore
from utils.cli import progress, say
from utils.devices import to_device

WITHOUT_TOKENS = (
    "Where only pooled features are at hand, --set DATA.tokens=pooled trains on them: a variant of its own, whose target "
    "is one token."
)


class CachedTokens:
    """Tokens of the frozen encoder as they were extracted: from device memory where they fit, from the files otherwise."""

    gives_tokens = True

    def __init__(self, store: BlockStore, device: torch.device, residence: str, reserve: int = 0):
        self.store, self.device = store, device
        self.num_views, self.dim = store.num_views, store.dim
        self._resident = None
        # On the CPU the page cache of the system is the memory that tokens are held in.
        if device.type == "cuda" and goes_to_device("target tokens", store.nbytes, device, residence, reserve):
            self._resident = self._read_all()

    def _read_all(self) -> Tensor:
        shape = (self.store.num_rows, self.num_views, self.store.num_tokens, self.dim)
        resident = torch.empty(shape, dtype=self.store.dtype, device=self.device)
        for rows in progress(list(torch.arange(self.store.num_rows).split(64)), description="tokens", leave=False):
            for view in range(self.num_views):
                resident[rows[0] : rows[-1] + 1, view] = to_device(
                    self.store.read(rows, torch.full_like(rows, view)), self.device
                )
        return resident

    def check(self, at_most: int) -> int:
        """Compare the caches with their checksums and see that their numbers are finite, before they are used.

        at_most: bytes; of more, every n-th spot of every slide is read. Returns n.
        Raises ValueError that names every cache with a fault, and the first in it.
        """
        step = -(-self.store.nbytes // at_most)
        problems = []
        for file in progress(range(self.store.num_files), description="tokens", unit="slide", leave=False):
            try:
                self.store.check(file, step)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return step

    def get(self, rows: Tensor, views: Tensor) -> Tensor:
        """(B, T, D) tokens on the device, in the type of the cache: the models widen them where they are needed."""
        if self._resident is not None:
            return self._resident[to_device(rows, self.device), to_device(views, self.device)]
        return self.store.read(rows, views).to(self.device, non_blocking=True)


class CutPatches:
    """uint8 patches of all spots, turned on the device; the step runs the frozen encoder on them."""

    gives_tokens = False
    num_views = NUM_VIEWS

    def __init__(self, patches: Tensor, device: torch.device, residence: str, reserve: int = 0):
        """patches: (R, P, P, 3) uint8."""
        self.device = device
        on_device = device.type == "cuda" and goes_to_device("patches", patches.nbytes, device, residence, reserve)
        self._patches = patches.to(device) if on_device else patches

    def get(self, rows: Tensor, views: Tensor) -> Tensor:
        """(B, 3, P, P) uint8 patches in their dihedral views, on the device."""
        if self._patches.device.type == self.device.type:
            patches = self._patches[to_device(rows, self.device)]
        else:
            patches = to_device(self._patches[rows], self.device)
        return dihedral_views(patches.permute(0, 3, 1, 2), to_device(views, self.device))


def open_tokens(
    layout: Layout,
    store: SpotStore,
    device: torch.device,
    *,
    choice: str,
    residence: str,
    num_workers: int,
    reserve: int = 0,
) -> CachedTokens | CutPatches:
    """Open the token caches if every slide has one (choice "auto" or "cache"), else the patches (choice "online").

    residence: where they are held, see `goes_to_device`.  num_workers: threads that read tokens.
    reserve: bytes of device memory to leave free.
    All caches are verified against the spots and the encoder of the features. The choice is printed.
    Raises FileNotFoundError for caches that are missing though they were chosen, ValueError for those that do not fit.
    """
    missing = [slide.name for slide in store.slides if not find_cache(layout, "token", slide.name).exists()]
    if choice == "cache" and missing:
        raise FileNotFoundError(
            f"DATA.tokens=cache: slides {', '.join(missing[:5])} have no token cache. Run: "
            f"{layout.repair('token', ','.join(missing), store.encoder.name)}\n{WITHOUT_TOKENS}"
        )
    if choice == "online" or missing:
        say(
            "Target tokens: the frozen encoder runs in every step (a token cache makes an epoch many times faster: "
            f"{layout.repair('token', None, store.encoder.name)})"
        )
        return CutPatches(_all_patches(layout, store.slides), device, residence, reserve)
    identity = _verify_tokens(layout, store)
    tokens = BlockStore(
        [find_cache(layout, "token", slide.name) for slide in store.slides],
        "token",
        num_threads=num_workers or 1,
        is_pinned=device.type == "cuda",
    )
    pooled = f", pooled by {identity.token_pool}" if identity.token_pool > 1 else ""
    say(
        f"Target tokens: from the token cache ({identity.views} of {NUM_VIEWS} views, {identity.dtype}{pooled}, "
        f"{tokens.nbytes / 1e9:.2f} GB)"
    )
    return CachedTokens(tokens, device, residence, reserve)


def _verify_tokens(layout: Layout, store: SpotStore) -> CacheIdentity:
    problems, identity = [], None
    for slide in store.slides:
        expected = {"kind": "token", "encoder": store.encoder.name, **expected_size(layout)}
        if store.encoder.sha256 != UNKNOWN:
            expected["encoder_sha256"] = store.encoder.sha256
        if slide.fingerprint not in (None, UNKNOWN):
            expected["image_fingerprint"] = slide.fingerprint
        try:
            identity = verify_cache(
                find_cache(layout, "token", slide.name),
                expected,
                list(slide.table.obs_names),
                slide.table.obsm["center"],
                repair=partial(layout.repair, "token", slide.name, store.encoder.name),
            )
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    assert identity is not None
    return identity


def _all_patches(layout: Layout, slides: Sequence[SlideRecord]) -> Tensor:
    """(R, P, P, 3) uint8: from the patch cache where a slide has one, else cut from its image, decoded once."""
    size = layout.patch_size
    patches = torch.empty((slides[-1].stop, size, size, 3), dtype=torch.uint8)
    for slide in progress(slides, description="patches", unit="slide", leave=False):
        path = find_cache(layout, "patch", slide.name)
        if path.exists():
            repair = partial(layout.repair, "patch", slide.name)
            centers = slide.table.obsm["center"]
            verify_cache(path, {"kind": "patch", **expected_size(layout)}, list(slide.table.obs_names), centers, repair)
            found = read_features(path)
        else:
            found = cut_patches(layout, slide)
        patches[slide.start : slide.stop] = torch.from_numpy(found)
    return patches


def cut_patches(layout: Layout, slide: SlideRecord) -> np.ndarray:
    """Cut the patches centred on the spots: (N, P, P, 3) uint8, white outside the image.

    Raises FileNotFoundError where the slide has no image, ValueError where it cannot be decoded.
    """
    size, covered = layout.patch_size, slide.covered_px or layout.patch_size
    corners, scaled = patch_corner(slide.table.obsm["center"], covered), None if covered == size else (size, size)
    with open_slide(slide.image or layout.image_path(slide.name)) as image:
        return np.stack([image.read_region(int(x), int(y), covered, covered, size=scaled) for x, y in corners])
