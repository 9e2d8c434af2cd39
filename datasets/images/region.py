"""The part of a slide that is wanted: areas drawn in QuPath (GeoJSON), or a mask image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.path import Path as Outline

from datasets.images.plain_reader import naming_the_file, open_picture
from datasets.images.slides import open_slide
from utils.files import reading, require_file
from utils.text import brief

_HINT = "--region should be a .geojson of areas or a mask image."
_SUFFIXES = (".geojson", ".json")
_MASK_PX = 4096  # longer side at which a mask is looked at
_RATIO = 0.02  # by so much of its own the shape of a mask may differ from that of the slide
_IGNORED = "Ignore"  # what QuPath's class for what is not to be measured begins with
_DRAWN = ("annotation", "PathAnnotationObject")  # and no cells, detections or cores; QuPath before 0.4 has it as the id
_FARTHEST = 1e9  # px; NaN is not below it either
_DEEPEST = 20  # of collections in collections


class Region(Protocol):
    """What is wanted of a slide."""

    def contains(self, centers: np.ndarray) -> np.ndarray:
        """(N,) bool of level-0 px (N, 2)."""
        ...


@dataclass(frozen=True)
class Areas:
    """Polygons, each a list of rings (n, 2) level-0 px, the first its outline and the others holes in it.

    left_out: polygons of a class that QuPath ignores; they are taken out of the wanted ones.
    """

    wanted: list[list[np.ndarray]]
    left_out: list[list[np.ndarray]]

    def contains(self, centers: np.ndarray) -> np.ndarray:
        """(N,) bool of level-0 px (N, 2)."""
        return _in_any(self.wanted, centers) & ~_in_any(self.left_out, centers)


@dataclass(frozen=True, eq=False)
class Mask:
    """is_wanted (H, W) bool over the whole slide; scale (2,): its pixels per level-0 pixel in x and y."""

    is_wanted: np.ndarray
    scale: np.ndarray

    def contains(self, centers: np.ndarray) -> np.ndarray:
        """(N,) bool of level-0 px (N, 2)."""
        height, width = self.is_wanted.shape
        x, y = np.clip(np.floor(centers * self.scale).astype(np.int64), 0, (width - 1, height - 1)).T
        return self.is_wanted[y, x]


def read_region(path: str | Path, image_size: tuple[int, int]) -> Region:
    """Read the region of a slide of `image_size` (width, height) px.

    A GeoJSON may hold polygons, multi-polygons, collections and features of them; other shapes (points, lines) are no areas
    and left out, as are objects of QuPath that are no annotations; classes that begin with "Ignore" are taken away. Of a
    mask image everything that is not black is wanted.
    Raises FileNotFoundError, or ValueError for a file without an area, areas outside the slide, a mask of another shape.
    """
    path = require_file(path, _HINT)
    return _read_areas(path, image_size) if path.suffix.lower() in _SUFFIXES else _read_mask(path, image_size)


def _read_areas(path: Path, image_size: tuple[int, int]) -> Areas:
    with reading(path, "areas of a slide (GeoJSON)", "Export it again: QuPath, File, Export objects as GeoJSON."):
        found = list(_polygons_of(json.loads(path.read_text(encoding="utf-8-sig")), str(path)))
        wanted = [rings for rings, is_ignored in found if not is_ignored]
        if not wanted:
            raise ValueError(
                f"{path} holds no area: expected a Polygon or MultiPolygon (in QuPath: annotations; cells, "
                "other detections, TMA cores, points and lines are none)."
            )
        low = np.min([rings[0].min(axis=0) for rings in wanted], axis=0)
        high = np.max([rings[0].max(axis=0) for rings in wanted], axis=0)
        if (high < 0).any() or (low >= image_size).any():
            raise ValueError(
                f"{path}: the areas lie from ({low[0]:.0f}, {low[1]:.0f}) to ({high[0]:.0f}, {high[1]:.0f}), outside the slide "
                f"of {image_size[0]} x {image_size[1]} px. Expected pixels of the full-resolution image; is it of this slide?"
            )
        return Areas(wanted, [rings for rings, is_ignored in found if is_ignored])


def _polygons_of(
    content: object, source: str, is_ignored: bool = False, depth: int = 0
) -> Iterator[tuple[list[np.ndarray], bool]]:
    """Every polygon of a GeoJSON object, and whether its class is one to be ignored."""
    if depth > _DEEPEST:
        raise ValueError(f"{source}: collections are nested more than {_DEEPEST} deep.")
    if isinstance(content, list):
        for part in content:
            yield from _polygons_of(part, source, is_ignored, depth + 1)
        return
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        raise ValueError(f"{source} is no GeoJSON: expected an object with a type, found {brief(content)}.")
    kind = content["type"]
    if kind == "FeatureCollection":
        yield from _polygons_of(content.get("features", []), source, is_ignored, depth + 1)
    elif kind == "GeometryCollection":
        yield from _polygons_of(content.get("geometries", []), source, is_ignored, depth + 1)
    elif kind == "Feature" and content.get("geometry") is not None and _is_drawn(content):
        yield from _polygons_of(content["geometry"], source, _is_ignored(content), depth + 1)
    elif kind in ("Polygon", "MultiPolygon"):
        polygons = content.get("coordinates")
        for rings in [polygons] if kind == "Polygon" else polygons if isinstance(polygons, list) else [None]:
            if not isinstance(rings, list) or not rings:
                raise ValueError(f"{source}: a {kind} should list its rings, found {brief(rings)}.")
            yield [_ring(ring, source) for ring in rings], is_ignored


def _is_drawn(feature: dict) -> bool:
    """Whether it is an annotation, or of a program that does not tell."""
    properties, name = feature.get("properties"), feature.get("id")
    kind = properties.get("objectType") if isinstance(properties, dict) else None
    kind = name if kind is None and isinstance(name, str) and name.endswith("Object") else kind
    return kind is None or kind in _DRAWN


def _is_ignored(feature: dict) -> bool:
    properties = feature.get("properties")
    named = properties.get("classification") if isinstance(properties, dict) else None
    name = named.get("name") if isinstance(named, dict) else named
    return isinstance(name, str) and name.startswith(_IGNORED)


def _ring(points: object, source: str) -> np.ndarray:
    """(n, 2) of the corners of a ring; a third coordinate is left out."""
    if not isinstance(points, list) or len(points) < 3:
        raise ValueError(f"{source}: a ring should be three corners or more, each [x, y], found {brief(points)}.")
    for point in points:
        is_corner = isinstance(point, list) and len(point) >= 2
        if not is_corner or not all(type(value) in (int, float) and abs(value) < _FARTHEST for value in point[:2]):
            raise ValueError(f"{source}: a corner should be two numbers, [x, y], found {brief(point)}.")
    return np.asarray([point[:2] for point in points], dtype=np.float64)


def _in_any(polygons: list[list[np.ndarray]], centers: np.ndarray) -> np.ndarray:
    inside = np.zeros(len(centers), dtype=bool)
    for outline, *holes in polygons:
        found = Outline(outline).contains_points(centers)
        for hole in holes:
            found &= ~Outline(hole).contains_points(centers)
        inside |= found
    return inside


def _read_mask(path: Path, image_size: tuple[int, int]) -> Mask:
    with naming_the_file(path), open_picture(path) as header:
        has_alpha = "A" in header.getbands()
    if has_alpha:
        raise ValueError(f"{path} is transparent in part, which a mask cannot be. Save it in black and white.")
    with open_slide(path) as image:
        ratio, expected = image.size[0] / image.size[1], image_size[0] / image_size[1]
        if abs(ratio / expected - 1) > _RATIO:
            raise ValueError(
                f"{path} has {image.size[0]} x {image.size[1]} px, another shape than the slide ({image_size[0]} x "
                f"{image_size[1]}). Expected a mask of the whole slide, at any scale."
            )
        pixels, _ = image.thumbnail(_MASK_PX)
    is_wanted = pixels.max(axis=2) > 0
    if not is_wanted.any():
        raise ValueError(f"{path} is black everywhere. Expected white, or any other value, where tissue is wanted.")
    if is_wanted.all():
        raise ValueError(
            f"{path} is black nowhere, as a picture of the slide is. Expected a mask, black where none is wanted."
        )
    return Mask(is_wanted, np.array(is_wanted.shape[::-1]) / np.array(image_size))
