"""The picture of a simulated section: hematoxylin, eosin, and the light that passes through them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from preprocess.simulation.tissue import (
    FAT_CELL,
    FIBRE,
    GLASS,
    INFILTRATE,
    LUMEN,
    MEMBRANE,
    NEST,
    WALL,
    Nuclei,
    Section,
    generator,
    smooth_noise,
)

# Optical density per unit of stain in red, green, blue (close to Ruifrok and Johnston 2001).
HEMATOXYLIN = np.array([0.78, 0.80, 0.36])
EOSIN = np.array([0.18, 0.72, 0.20])
# (hematoxylin, eosin) that the ground itself takes up.
UPTAKE = {
    GLASS: (0.0, 0.0),
    NEST: (0.26, 0.34),
    WALL: (0.24, 0.36),
    LUMEN: (0.02, 0.05),
    FIBRE: (0.07, 0.34),
    INFILTRATE: (0.22, 0.22),
    FAT_CELL: (0.01, 0.03),
    MEMBRANE: (0.06, 0.46),
}
STAMP = 6  # px from the middle of a nucleus that its picture may reach


@dataclass(frozen=True)
class Stain:
    """hematoxylin, eosin: (3,) optical density per unit in red, green, blue; lamp: (3,) colour of the empty glass,
    0-255."""

    hematoxylin: np.ndarray
    eosin: np.ndarray
    lamp: np.ndarray


def draw_stain(seed: int, patient: str, slide: str, spread: float = 1.0) -> Stain:
    """Stain of a section: differs between patients, and a quarter as much between the sections of one."""
    lamp = np.array([243.0, 238.0, 244.0])
    colors = [HEMATOXYLIN.copy(), EOSIN.copy()]
    for random, amount in (
        (generator(seed, patient, "stain"), spread),
        (generator(seed, slide, "stain"), 0.25),
    ):
        for color in colors:
            color *= np.exp(amount * (random.normal(0.0, 0.17) + random.normal(0.0, 0.08, 3)))
        lamp = lamp + amount * random.normal(0.0, 3.0, 3)
    return Stain(colors[0], colors[1], np.clip(lamp, 225.0, 253.0))


def render(section: Section, stain: Stain, random: np.random.Generator) -> np.ndarray:
    """Picture of the section, (height, width, 3) uint8."""
    shape = section.ground.shape
    lookup = np.array([UPTAKE[ground] for ground in sorted(UPTAKE)], dtype=np.float32)
    hematoxylin, eosin = lookup[section.ground, 0], lookup[section.ground, 1]
    eosin *= _fibre_texture(section, random)
    grain = random.standard_normal(shape, dtype=np.float32)
    cytoplasm = np.exp(0.30 * smooth_noise(random, shape, 2.0) + 0.18 * smooth_noise(random, shape, 18.0))
    eosin *= cytoplasm
    hematoxylin = gaussian_filter(hematoxylin * cytoplasm, 0.9)
    nuclei = _stamp_nuclei(section.nuclei, shape)
    chromatin = np.clip(1.0 + 0.22 * grain, 0.4, 1.6)
    hematoxylin = hematoxylin * (1.0 - 0.6 * nuclei) + nuclei * chromatin
    eosin = gaussian_filter(eosin, 0.6) * (1.0 - 0.25 * np.clip(nuclei, 0, 1))
    hematoxylin = gaussian_filter(hematoxylin, 0.55)
    light = stain.lamp * (1.0 + 0.012 * smooth_noise(random, shape, 200.0)[..., None])
    density = hematoxylin[..., None] * stain.hematoxylin + eosin[..., None] * stain.eosin
    picture = light * np.exp(-density) + 1.6 * grain[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _fibre_texture(section: Section, random: np.random.Generator) -> np.ndarray:
    """(height, width) factor on the eosin: bundles and single fibres in fibrous ground, one elsewhere."""
    phase = section.fibre_phase
    steps = np.floor(phase - phase.min()).astype(np.intp)
    length = int(steps.max()) + 1
    across = np.zeros(length, dtype=np.float32)
    for width, amount in ((0.8, 0.55), (4.0, 0.75)):
        waves = gaussian_filter(random.standard_normal(length), width, mode="wrap")
        across += (amount * waves * np.sqrt(2 * width * np.sqrt(np.pi))).astype(np.float32)
    bundles = across[steps] + 0.5 * smooth_noise(random, phase.shape, 12.0)
    return np.where(section.ground == FIBRE, np.exp(np.clip(0.55 * bundles, -2.2, 1.1)), 1.0).astype(np.float32)


def _stamp_nuclei(nuclei: Nuclei, shape: tuple[int, int]) -> np.ndarray:
    """(height, width) float32 hematoxylin of the nuclei: soft ellipses, the darker one where two overlap."""
    offsets = np.stack(np.meshgrid(*[np.arange(-STAMP, STAMP + 1)] * 2), axis=-1).reshape(-1, 2)
    corner = np.floor(nuclei.position).astype(np.intp)
    pixel = corner[:, None, :] + offsets
    relative = (pixel - nuclei.position[:, None, :]).astype(np.float32)
    cosine, sine = np.cos(nuclei.angle)[:, None], np.sin(nuclei.angle)[:, None]
    along = (relative[..., 0] * cosine + relative[..., 1] * sine) / nuclei.radii[:, :1]
    across = (relative[..., 1] * cosine - relative[..., 0] * sine) / nuclei.radii[:, 1:]
    distance = np.sqrt(along**2 + across**2)
    value = nuclei.darkness[:, None] * np.clip((1.25 - distance) / 0.5, 0.0, 1.0)
    height, width = shape
    drawn = (value > 0) & (pixel >= 0).all(axis=-1) & (pixel[..., 0] < width) & (pixel[..., 1] < height)
    canvas = np.zeros(height * width, dtype=np.float32)
    np.maximum.at(canvas, pixel[..., 1][drawn] * width + pixel[..., 0][drawn], value[drawn].astype(np.float32))
    return canvas.reshape(shape)
