"""Counts of a simulated section: programs of genes that depend on what lies in, around and beyond a spot.

Each gene belongs to one program, each program to one of the scales of the model. `target`: the tissue of the
patch itself. `neighbor`: the patch and what lies within about two pitches of it. `global`: the patch and its place
in the section (depth below the edge) or the make-up of the whole section.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from preprocess.simulation.tissue import (
    BACKGROUND,
    FAT,
    FIBROBLAST,
    GLAND_CELL,
    LYMPHOCYTE,
    TUMOUR_CELL,
    Section,
    generator,
)

# program -> (scale, genes); symbols of genes that are known for such a behaviour.
PROGRAMS = {
    "tumour": ("target", "ERBB2 KRT19 MIEN1 GRB7 FASN EPCAM KRT8 SPDEF TFF3 CD24"),
    "gland": ("target", "SCGB2A2 MUCL1 KRT14 KRT5 PIP AZGP1 KRT17 LTF KRT15 WIF1"),
    "stroma": ("target", "COL1A1 COL3A1 SPARC COL1A2 LUM DCN BGN FBLN1 COL6A3 AEBP1"),
    "fat": ("target", "FABP4 PLIN1 ADIPOQ LPL PLIN4 CIDEC G0S2 LEP AOC3 GPD1"),
    "lymphoid": ("target", "CD74 CD52 CXCR4 TRBC2 CD3E PTPRC LTB CD79A CCR7 MS4A1"),
    "housekeeping": ("target", "ACTB GAPDH TMSB10 B2M TPT1 FTL EEF2 RACK1 PFN1 UBA52"),
    "invasive_front": ("neighbor", "POSTN MMP11 COL11A1 CTHRC1 FAP COL10A1 SFRP2 INHBA LRRC15 MMP13"),
    "tumour_margin": ("neighbor", "LAMC2 S100A6 KRT7 ITGB6 TNC LAMB3 PDPN MMP14 PLAUR ITGA3"),
    "interferon": ("neighbor", "ISG15 IFI6 CXCL9 STAT1 HLA-DRA CXCL10 GBP1 IDO1 BST2 IFIT3"),
    "plasma": ("neighbor", "IGKC IGHG3 IGHA1 JCHAIN IGLC2 MZB1 IGHM IGLC3 DERL3 XBP1"),
    "hypoxia": ("global", "VEGFA NDRG1 CA9 SLC2A1 LDHA ADM BNIP3 PGK1 P4HA1 ANGPTL4"),
    "perfusion": ("global", "PECAM1 VWF CLDN5 PLVAP AQP1 CDH5 RAMP2 ESAM EGFL7 ENG"),
    "inflamed_section": ("global", "S100A8 LCN2 SAA1 S100A9 CXCL8 CCL2 SOD2 IL6 CHI3L1 PI3"),
}
GENES = tuple(
    symbol for symbols in zip(*(genes.split() for _, genes in PROGRAMS.values()), strict=True) for symbol in symbols
)  # in turns from every program, so that any first part of the list holds them all
PROGRAM_OF = {symbol: program for program, (_, genes) in PROGRAMS.items() for symbol in genes.split()}

DENSITY_STEP = 8  # px per cell of the maps of density
# Density of nuclei, per pixel, that counts as full; scales the abundances to about 0..1.
FULL_DENSITY = {TUMOUR_CELL: 0.022, GLAND_CELL: 0.016, LYMPHOCYTE: 0.038, FIBROBLAST: 0.0055}
TISSUES = {"tumour": TUMOUR_CELL, "gland": GLAND_CELL, "lymphoid": LYMPHOCYTE, "stroma": FIBROBLAST}
HIGH_MEAN, LOW_MEAN = (4.0, 90.0), (0.4, 3.0)  # counts per spot of the genes inside and outside the panel
DISPERSION = 4.0  # variance = mean + mean^2 / dispersion
PATIENT_EFFECT, SECTION_EFFECT, LIBRARY_SPREAD = 0.35, 0.12, 0.35  # standard deviations of natural logarithms


@dataclass(frozen=True)
class GeneModel:
    """Parameters of the simulated genes. genes: names in the order of the rows; base: (G,) log mean;
    weights: (G, programs) log-fold change from no to full activity of a program."""

    genes: tuple[str, ...]
    base: np.ndarray
    weights: np.ndarray


def gene_model(seed: int, num_genes: int) -> GeneModel:
    """Draw the genes: the first `num_genes` of GENES are expressed highly, as many others lowly."""
    if not len(PROGRAMS) <= num_genes <= len(GENES):
        raise ValueError(
            f"num_genes is {num_genes}; the simulation has {len(GENES)} genes in {len(PROGRAMS)} programs: "
            f"choose a number from {len(PROGRAMS)} to {len(GENES)}."
        )
    genes = GENES[: min(2 * num_genes, len(GENES))]
    random = generator(seed, "genes")
    count = len(genes)
    high, low = (np.log(bounds) for bounds in (HIGH_MEAN, LOW_MEAN))
    position = random.random(count)
    is_high = np.arange(count) < num_genes
    base = np.where(is_high, high[0] + position * (high[1] - high[0]), low[0] + position * (low[1] - low[0]))
    weights = random.normal(0.0, 0.12, (count, len(PROGRAMS)))
    own = [list(PROGRAMS).index(PROGRAM_OF[gene]) for gene in genes]
    weights[np.arange(count), own] += random.uniform(1.6, 2.4, count)
    order = random.permutation(count)  # a real table is not sorted by what genes do
    return GeneModel(tuple(genes[index] for index in order), base[order], weights[order])


def abundances(section: Section, centers: np.ndarray) -> tuple[dict, dict]:
    """How much of each tissue lies in each patch and around it.

    centers: (N, 2) x, y in px. returns: (local, around), each tissue name -> (N,) of about 0..1; `around` weighs
    the surroundings by a Gaussian of one pitch and leaves the patch itself out.
    """
    local, around = {}, {}
    inner, outer = 0.30 * section.pitch / DENSITY_STEP, 1.05 * section.pitch / DENSITY_STEP
    covered = _density(section, _pixel_grid(section.region != BACKGROUND))
    for tissue in (*TISSUES, "fat"):
        if tissue == "fat":
            density = _density(section, _pixel_grid(section.region == FAT))
        else:
            kind = TISSUES[tissue]
            density = _density(section, section.nuclei.position[section.nuclei.kind == kind])
            density = density / (FULL_DENSITY[kind] * DENSITY_STEP**2)
        near, far = (gaussian_filter(density, sigma, mode="constant") for sigma in (inner, outer))
        share = (inner / outer) ** 2 / 2  # of the wide Gaussian that falls on the patch itself, about
        ground = gaussian_filter(covered, outer, mode="constant") - share * gaussian_filter(covered, inner)
        ring = np.clip(far - share * near, 0, None) / np.maximum(ground, 0.25)
        places = centers[:, ::-1].T / DENSITY_STEP - 0.5
        local[tissue] = map_coordinates(near, places, order=1, mode="nearest")
        around[tissue] = map_coordinates(ring, places, order=1, mode="nearest")
    return local, around


def _pixel_grid(mask: np.ndarray) -> np.ndarray:
    """Every DENSITY_STEP-th pixel of a mask as positions (K, 2), so that areas are counted like nuclei."""
    half = DENSITY_STEP // 2
    y, x = np.nonzero(mask[half::DENSITY_STEP, half::DENSITY_STEP])
    return np.stack([x, y], axis=1) * DENSITY_STEP + half


def _density(section: Section, positions: np.ndarray) -> np.ndarray:
    """Number of positions in every cell of DENSITY_STEP px."""
    rows, columns = (int(np.ceil(extent / DENSITY_STEP)) for extent in section.region.shape)
    x, y = (positions / DENSITY_STEP).astype(np.intp).T
    return np.bincount(y * columns + x, minlength=rows * columns).reshape(rows, columns).astype(np.float64)


def activities(section: Section, centers: np.ndarray) -> np.ndarray:
    """Activity of every program in every spot, (N, programs) float64 of about 0..1, columns as PROGRAMS."""
    local, around = abundances(section, centers)
    x, y = np.floor(centers).astype(np.intp).T
    depth = section.depth[y, x] / section.depth.max()
    epithelium = np.clip(local["tumour"] + local["gland"], 0, 1)
    cells = np.clip(epithelium + local["lymphoid"] + 0.5 * local["stroma"], 0, 1)
    inflamed = 2.0 * _step(np.mean(local["lymphoid"]), 0.18, 0.05) - 1.0  # -1 a cold section .. 1 a hot one
    by_program = {
        **{tissue: local[tissue] for tissue in ("tumour", "gland", "stroma", "fat", "lymphoid")},
        "housekeeping": 0.5 * cells,
        "invasive_front": (0.25 + 0.75 * np.clip(local["stroma"], 0, 1)) * _step(around["tumour"], 0.25, 0.07),
        "tumour_margin": np.clip(local["tumour"], 0, 1) * _step(around["stroma"], 0.35, 0.08),
        "interferon": (0.3 + 0.7 * epithelium) * _step(around["lymphoid"], 0.15, 0.05),
        "plasma": _step(around["gland"], 0.11, 0.04) * (0.4 + 0.6 * np.clip(local["lymphoid"] + local["stroma"], 0, 1)),
        "hypoxia": (0.3 + 0.7 * cells) * _step(depth, 0.55, 0.10),
        "perfusion": (0.4 + 0.6 * np.clip(local["stroma"] + local["fat"], 0, 1)) * _step(-depth, -0.45, 0.08),
        "inflamed_section": 0.5 + 0.5 * inflamed * (2.0 * epithelium - 1.0),
    }
    return np.clip(np.stack([by_program[program] for program in PROGRAMS], axis=1), 0.0, 1.3)


def _step(value: np.ndarray, threshold: float, softness: float) -> np.ndarray:
    """Smooth step from 0 below the threshold to 1 above it."""
    return 1.0 / (1.0 + np.exp(-(value - threshold) / softness))


def expected_counts(
    model: GeneModel, section: Section, centers: np.ndarray, *, seed: int, patient: str, slide: str
) -> np.ndarray:
    """Mean count of every gene in every spot of a library of normal size, (N, G) float64."""
    count = len(model.genes)
    shift = generator(seed, patient, "expression").normal(0.0, PATIENT_EFFECT, count)
    shift = shift + generator(seed, slide, "expression").normal(0.0, SECTION_EFFECT, count)
    change = np.einsum("np,gp->ng", activities(section, centers) - 0.35, model.weights)  # same sums on any machine
    return np.exp(model.base + shift + change)


def draw_counts(means: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Negative binomial counts, (N, G) int64, with a library size that differs from spot to spot."""
    library = np.exp(random.normal(0.0, LIBRARY_SPREAD, (len(means), 1)))
    return random.poisson(random.gamma(DISPERSION, means * library / DISPERSION))
