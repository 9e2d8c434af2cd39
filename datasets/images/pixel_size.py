"""The size of a pixel in micrometres, from whatever the metadata of an image say."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

import openslide
import tifffile

_PLAUSIBLE_MICRONS = (0.05, 10.0)  # per pixel, of a slide scanner; 72 or 300 dpi describe a print
_MICRONS_OF_UNIT = {
    "nm": 1e-3,
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometer", "micrometre"), 1.0),
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "Å": 1e-4,
    **dict.fromkeys(("in", "inch", "inches"), 25_400.0),
}
_MICRONS_OF_TAG = {2: 25_400.0, 3: 10_000.0}  # ResolutionUnit of TIFF: inch, centimetre


def microns_of_tiff(file: tifffile.TiffFile) -> float | None:
    """Return what the first page of a TIFF says: OME, Aperio or ImageJ in its description, else its resolution tags."""
    page = file.pages.first
    description = page.description or ""
    if "<OME" in description:
        stated = _microns_of_ome(description)
        if stated is not None:
            return stated
    aperio = re.search(r"\bMPP\s*=\s*([0-9.]+)", description)
    if aperio:
        return _plausible(float(aperio[1]))
    microns_per_unit = _microns_of_imagej(description) or _MICRONS_OF_TAG.get(int(page.resolutionunit))
    return _microns_of_resolution(microns_per_unit, float(page.resolution[0]))


def microns_of_dpi(dpi: tuple[float, float] | None) -> float | None:
    """Return the size of a pixel of an image whose dots per inch (x, y) are known."""
    return _microns_of_resolution(_MICRONS_OF_TAG[2], float(dpi[0])) if dpi else None


def microns_of_properties(properties: Mapping[str, str]) -> float | None:
    """Return OpenSlide's own figure, else the TIFF resolution tags that it passes on."""
    stated = properties.get(openslide.PROPERTY_NAME_MPP_X)
    if stated:
        return _plausible(float(stated))
    microns_per_unit = {"inch": 25_400.0, "centimeter": 10_000.0}.get(properties.get("tiff.ResolutionUnit", ""))
    return _microns_of_resolution(microns_per_unit, float(properties.get("tiff.XResolution") or 0))


def _microns_of_ome(description: str) -> float | None:
    """PhysicalSizeX of the first image, in its unit (micrometres where none is given)."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", description)
    if pixels is None:
        return None
    attributes = {name: html.unescape(value) for name, value in re.findall(r'(\w+)\s*=\s*"([^"]*)"', pixels[0])}
    microns_per_unit = _MICRONS_OF_UNIT.get(attributes.get("PhysicalSizeXUnit", "µm"))
    try:
        return _plausible(float(attributes["PhysicalSizeX"]) * microns_per_unit) if microns_per_unit else None
    except (KeyError, ValueError):
        return None


def _microns_of_imagej(description: str) -> float | None:
    """Microns in the unit that ImageJ's resolution is of; None where it names none, or no length (pixel)."""
    unit = re.search(r"^unit=(.*?)\s*$", description, re.MULTILINE) if description.startswith("ImageJ=") else None
    if unit is None:
        return None
    return _MICRONS_OF_UNIT.get(re.sub(r"\\u([0-9A-Fa-f]{4})", lambda code: chr(int(code[1], 16)), unit[1]))


def _microns_of_resolution(microns_per_unit: float | None, pixels_per_unit: float) -> float | None:
    return _plausible(microns_per_unit / pixels_per_unit) if microns_per_unit and pixels_per_unit else None


def _plausible(microns: float) -> float | None:
    return float(microns) if _PLAUSIBLE_MICRONS[0] <= microns <= _PLAUSIBLE_MICRONS[1] else None
