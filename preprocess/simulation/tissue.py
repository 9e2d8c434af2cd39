"""Random breast tissue: which region lies where, what it is built of, and where the nuclei are.

A section is made in three steps, from coarse to fine: regions (smooth random fields, shared by the sections of a
patient), ground (nests, glands, fat cells and fibres within a region) and nuclei (placed on the ground). The
picture and the expression are both derived from the result, so that what is measured can be seen.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial import cKDTree

# Regions of a section.
BACKGROUND, TUMOUR, GLAND, STROMA, LYMPHOID, FAT = range(6)
# What a pixel is made of.
GLASS, NEST, WALL, LUMEN, FIBRE, INFILTRATE, FAT_CELL, MEMBRANE = range(8)
# Kinds of nuclei.
TUMOUR_CELL, GLAND_CELL, LYMPHOCYTE, FIBROBLAST = range(4)

MARGIN = 1.6  # pitches from the edge of the image to the first spot: outer neighbor tiles there lie outside
SECTION_LIKENESS = 0.85  # correlation of the region fields of two sections of one patient
REGION_BIAS = {TUMOUR: 0.35, GLAND: 0.15, STROMA: 0.3, LYMPHOID: -0.2, FAT: -0.25}
FAT_CELL_SPACING = 24.0  # px; the texture is that of a scan at about 1.6 micrometres per pixel
GLAND_SPACING = 44.0


@dataclass(frozen=True)
class NucleusKind:
    """How nuclei of one kind are spread and shaped; lengths in px."""

    kind: int
    grounds: tuple[int, ...]
    spacing: float
    share: float  # of the places of the jittered lattice that hold a nucleus
    radius: float
    elongation: float
    darkness: float


NUCLEUS_KINDS = (
    NucleusKind(TUMOUR_CELL, (NEST,), 6.6, 0.92, 2.55, 1.25, 0.80),
    NucleusKind(GLAND_CELL, (WALL,), 5.4, 0.95, 2.05, 1.45, 1.00),
    NucleusKind(LYMPHOCYTE, (INFILTRATE,), 4.7, 0.92, 1.75, 1.05, 1.25),
    NucleusKind(FIBROBLAST, (FIBRE,), 9.0, 0.50, 1.75, 2.60, 0.85),
    NucleusKind(FIBROBLAST, (MEMBRANE,), 7.0, 0.12, 1.45, 1.80, 0.85),
)


@dataclass(frozen=True)
class Nuclei:
    """position: (K, 2) float32 x, y in px; kind: (K,); radii: (K, 2) long and short, px; angle: (K,) of the long
    one, rad; darkness: (K,) amount of hematoxylin."""

    position: np.ndarray
    kind: np.ndarray
    radii: np.ndarray
    angle: np.ndarray
    darkness: np.ndarray


@dataclass(frozen=True)
class Section:
    """One simulated section.

    region, ground: (height, width) int8, the constants of this module.
    fibre_phase:    (height, width) float32, px across the fibres.
    depth:          (height, width) float32, px to the nearest edge of the tissue, 0 outside.
    pitch:          px between two spots.
    """

    region: np.ndarray
    ground: np.ndarray
    fibre_phase: np.ndarray
    depth: np.ndarray
    nuclei: Nuclei
    pitch: int


def generator(seed: int, *labels: str) -> np.random.Generator:
    """A generator that depends on the seed and the labels alone, the same in every process."""
    return np.random.default_rng([seed, *(zlib.crc32(label.encode()) for label in labels)])


def smooth_noise(random: np.random.Generator, shape: tuple[int, int], length: float) -> np.ndarray:
    """Gaussian field of zero mean and unit variance, (height, width) float32, correlated over `length` px."""
    step = max(1.0, length / 2.5)
    coarse = tuple(int(np.ceil(extent / step)) + 4 for extent in shape)
    sigma = length / step
    field = gaussian_filter(random.standard_normal(coarse, dtype=np.float32), sigma, mode="wrap")
    field *= 2.0 * sigma * np.sqrt(np.pi)  # the filter divides the variance of white noise by 4 pi sigma^2
    if step == 1.0:
        return field[: shape[0], : shape[1]]
    height, width = shape
    box = (1.0, 1.0, 1.0 + width / step, 1.0 + height / step)
    return np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC, box=box))


def simulate_section(seed: int, patient: str, slide: str, shape: tuple[int, int], pitch: int) -> Section:
    """Draw one section of `patient`; shape = (height, width) in px, pitch = px between two spots."""
    region = _regions(generator(seed, patient, "regions"), generator(seed, slide, "regions"), shape, pitch)
    random = generator(seed, slide, "ground")
    phase = _fibre_phase(random, shape)
    ground = _ground(random, region)
    nuclei = _nuclei(generator(seed, slide, "nuclei"), ground, phase, pitch)
    depth = distance_transform_edt(region != BACKGROUND).astype(np.float32)
    return Section(region, ground, phase, depth, nuclei, pitch)


def _regions(
    of_patient: np.random.Generator, of_slide: np.random.Generator, shape: tuple[int, int], pitch: int
) -> np.ndarray:
    """(height, width) int8 region of every pixel: the kind whose smooth random field is highest there."""
    fields = []
    for kind in sorted(REGION_BIAS):
        (patient_field, patient_bias), (slide_field, slide_bias) = (
            (_field(random, shape, pitch), random.normal(0.0, 0.2)) for random in (of_patient, of_slide)
        )
        field = np.sqrt(SECTION_LIKENESS) * patient_field + np.sqrt(1.0 - SECTION_LIKENESS) * slide_field
        if kind == TUMOUR:  # the front is ragged: small groups of tumour cells in the neighbouring tissue
            field = field + 0.30 * smooth_noise(of_slide, shape, 0.22 * pitch)
        fields.append(field + (REGION_BIAS[kind] + patient_bias + 0.8 * slide_bias))
    region = (np.argmax(fields, axis=0) + TUMOUR).astype(np.int8)
    region[_outline(of_patient, of_slide, shape, pitch) > 1.0] = BACKGROUND
    return region


def _field(random: np.random.Generator, shape: tuple[int, int], pitch: int) -> np.ndarray:
    """Smooth field of unit variance: patches of tissue about two to four spots wide, with uneven borders."""
    return 0.92 * smooth_noise(random, shape, 1.5 * pitch) + 0.39 * smooth_noise(random, shape, 0.6 * pitch)


def _outline(
    of_patient: np.random.Generator, of_slide: np.random.Generator, shape: tuple[int, int], pitch: int
) -> np.ndarray:
    """(height, width) distance from the middle, 1 at the edge of the tissue: a rounded box, bent and torn a little."""
    height, width = shape
    border = (MARGIN - 0.5) * pitch
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    right, down = np.abs(x - width / 2) / (width / 2 - border), np.abs(y - height / 2) / (height / 2 - border)
    bent = 0.10 * smooth_noise(of_patient, shape, 1.3 * pitch) + 0.012 * smooth_noise(of_slide, shape, 7.0)
    near_glass = np.maximum(right / (1 + 0.7 * pitch / (width / 2)), down / (1 + 0.7 * pitch / (height / 2)))
    return np.maximum((right**3 + down**3) ** (1 / 3) + bent, near_glass)


def _fibre_phase(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Coordinate across the collagen fibres in px: a tilted plane, bent by smooth noise."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    angle = random.uniform(0, np.pi)
    plane = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    return plane + 55.0 * smooth_noise(random, shape, 90.0) + 7.0 * smooth_noise(random, shape, 22.0)


def _ground(random: np.random.Generator, region: np.ndarray) -> np.ndarray:
    """(height, width) int8: what each pixel of each region is made of."""
    shape = region.shape
    ground = np.choose(region, [GLASS, FIBRE, FIBRE, FIBRE, INFILTRATE, FAT_CELL]).astype(np.int8)
    nests = smooth_noise(random, shape, 9.0) + 0.5 * smooth_noise(random, shape, 26.0)
    ground[(region == TUMOUR) & (nests > -0.45)] = NEST
    for kind, draw in ((GLAND, _glands), (FAT, _fat_cells)):
        inside = np.nonzero(region == kind)
        if len(inside[0]):
            ground[inside] = draw(random, np.stack(inside[::-1], axis=1).astype(np.float32), shape)
    return ground


def _glands(random: np.random.Generator, pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Ground of gland pixels (K, 2): ducts with a wall and mostly a lumen, in fibrous tissue."""
    centers = _lattice(random, shape, GLAND_SPACING, jitter=0.25)
    distance, nearest = cKDTree(centers).query(pixels)
    radius = random.uniform(13.0, 22.0, len(centers))[nearest]
    lumen = np.where(random.random(len(centers)) < 0.8, random.uniform(0.25, 0.55, len(centers)), 0.0)[nearest]
    offset = pixels - centers[nearest]
    lobes = random.uniform(0, 2 * np.pi, len(centers))[nearest] + 3.0 * np.arctan2(offset[:, 1], offset[:, 0])
    relative = distance / (radius * (1.0 + 0.13 * np.sin(lobes)))
    return np.where(relative > 1.0, FIBRE, np.where(relative < lumen, LUMEN, WALL)).astype(np.int8)


def _fat_cells(random: np.random.Generator, pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Ground of fat pixels (K, 2): a Voronoi foam of empty cells with thin membranes."""
    centers = _lattice(random, shape, FAT_CELL_SPACING, jitter=0.38)
    distance, _ = cKDTree(centers).query(pixels, k=2)
    return np.where(distance[:, 1] - distance[:, 0] < 2.8, MEMBRANE, FAT_CELL).astype(np.int8)


def _lattice(random: np.random.Generator, shape: tuple[int, int], spacing: float, jitter: float) -> np.ndarray:
    """(K, 2) float32 positions x, y: a lattice with shifted odd rows, its points moved by up to jitter * spacing."""
    rows, columns = (int(np.ceil(extent / spacing)) + 1 for extent in shape)
    row, column = np.mgrid[0:rows, 0:columns]
    points = np.stack([column + 0.5 * (row % 2), row], axis=-1).reshape(-1, 2).astype(np.float32)
    return (points + random.uniform(-jitter, jitter, points.shape).astype(np.float32)) * np.float32(spacing)


def _nuclei(random: np.random.Generator, ground: np.ndarray, phase: np.ndarray, pitch: int) -> Nuclei:
    """Place the nuclei of every kind on its ground, and single lymphocytes in some fibres and nests."""
    shape = ground.shape
    crowding = 1.0 + 0.12 * smooth_noise(random, shape, 1.0 * pitch)
    infiltration = np.clip(0.28 * smooth_noise(random, shape, 1.2 * pitch) - 0.12, 0.0, 0.6)
    scattered = NucleusKind(LYMPHOCYTE, (FIBRE, NEST), 7.0, 1.0, 1.75, 1.05, 1.25)
    parts = [_place(random, rule, ground, rule.share * crowding) for rule in NUCLEUS_KINDS]
    parts.append(_place(random, scattered, ground, infiltration))
    position, kind, radii, angle, darkness = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    x, y = position.astype(np.intp).T
    along = np.isin(ground[y, x], (FIBRE, MEMBRANE)) & (kind == FIBROBLAST)
    down, right = np.gradient(phase)
    angle = np.where(along, np.arctan2(right[y, x], -down[y, x]) + 0.25 * angle, angle)  # nuclei lie along the fibres
    return Nuclei(position, kind, radii, angle.astype(np.float32), darkness)


def _place(
    random: np.random.Generator, rule: NucleusKind, ground: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Nuclei of one rule; share: (height, width) probability that a place of the lattice is taken."""
    height, width = ground.shape
    points = _lattice(random, ground.shape, rule.spacing, jitter=0.33)
    points = points[((points >= 0) & (points < (width, height))).all(axis=1)]
    x, y = points.astype(np.intp).T
    taken = np.isin(ground[y, x], rule.grounds) & (random.random(len(points)) < share[y, x])
    points = points[taken]
    count = len(points)
    size = rule.radius * np.exp(random.normal(0.0, 0.13, count))
    stretch = np.sqrt(rule.elongation * np.exp(random.normal(0.0, 0.12, count)))
    radii = np.stack([size * stretch, size / stretch], axis=1).astype(np.float32)
    angle = random.uniform(-np.pi / 2, np.pi / 2, count)
    darkness = rule.darkness * random.uniform(0.8, 1.15, count)
    return points, np.full(count, rule.kind, np.int8), radii, angle, darkness.astype(np.float32)
