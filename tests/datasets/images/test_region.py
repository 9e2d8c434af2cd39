"""Regions of a slide: every form that QuPath writes, masks, and what is neither."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from datasets.images.region import read_region

SIZE = (200, 100)
INSIDE, HOLE, OUTSIDE, SECOND = [20, 20], [50, 50], [150, 10], [180, 80]
POINTS = np.array([INSIDE, HOLE, OUTSIDE, SECOND])


def square(left: float, top: float, side: float) -> list[list[float]]:
    right, bottom = left + side, top + side
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


WITH_HOLE = {"type": "Polygon", "coordinates": [square(5, 5, 80), square(40, 40, 20)]}
OTHER = {"type": "Polygon", "coordinates": [square(170, 70, 20)]}


def feature(geometry: dict, name: str | None = None) -> dict:
    properties = {"objectType": "annotation", **({"classification": {"name": name}} if name else {})}
    return {"type": "Feature", "id": "x", "geometry": geometry, "properties": properties}


def found(kind: str | None, geometry: dict, name: str | None = None, **more: str) -> dict:
    """An object of QuPath of another kind; of None as QuPath 0.3 has it, whose id tells."""
    one = feature(geometry, name)
    return {**one, "properties": {**one["properties"], "objectType": kind}, **more}


def region(tmp_path, content: object, name: str = "region.geojson"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_region(path, SIZE)


def test_a_byte_order_mark_before_the_areas_is_no_part_of_them(tmp_path):
    content = {"type": "Polygon", "coordinates": [[[0, 0], [50, 0], [50, 50], [0, 50], [0, 0]]]}
    (tmp_path / "region.geojson").write_text(json.dumps(content), encoding="utf-8-sig")
    found = read_region(tmp_path / "region.geojson", SIZE)
    assert found.contains(np.array([[25.0, 25.0], [75.0, 25.0]])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (WITH_HOLE, [1, 0, 0, 0]),
        (feature(WITH_HOLE, "Tumor"), [1, 0, 0, 0]),
        ([feature(WITH_HOLE), feature(OTHER)], [1, 0, 0, 1]),
        ({"type": "FeatureCollection", "features": [feature(WITH_HOLE), feature(OTHER)]}, [1, 0, 0, 1]),
        ({"type": "MultiPolygon", "coordinates": [WITH_HOLE["coordinates"], OTHER["coordinates"]]}, [1, 0, 0, 1]),
        ({"type": "GeometryCollection", "geometries": [OTHER, {"type": "Point", "coordinates": [0, 0]}]}, [0, 0, 0, 1]),
        ([feature({"type": "Polygon", "coordinates": [square(0, 0, 199)]}), feature(OTHER, "Ignore*")], [1, 1, 1, 0]),
        ([feature(OTHER), {"type": "Feature", "geometry": None, "properties": None}], [0, 0, 0, 1]),
        ([{**feature(WITH_HOLE), "properties": {}}, found("cell", OTHER), found("tma_core", OTHER)], [1, 0, 0, 0]),
        ([found(None, WITH_HOLE, id="PathAnnotationObject"), found(None, OTHER, id="PathCellObject")], [1, 0, 0, 0]),
    ],
)
def test_areas(tmp_path, content, expected):
    assert region(tmp_path, content).contains(POINTS).astype(int).tolist() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", r"region\.geojson cannot be read as areas of a slide.*it is not JSON"),
        (3, "is no GeoJSON"),
        ({"type": "LineString", "coordinates": [[0, 0], [1, 1]]}, "holds no area"),
        ({"type": "FeatureCollection", "features": []}, "holds no area"),
        ([found("cell", OTHER), found("detection", WITH_HOLE)], "holds no area.*annotations; cells, other detections"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}, "a ring should be three corners or more"),
        (
            {"type": "Polygon", "coordinates": [[[0, 0], [1, "1"], [2, 2]]]},
            r"a corner should be two numbers.*found \[1, '1'\]",
        ),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [2, 2]]]}', "a corner should be two numbers"),
        ({"type": "Polygon", "coordinates": []}, "should list its rings"),
        ({"type": "MultiPolygon", "coordinates": 3}, "should list its rings"),
        ({"type": "Polygon", "coordinates": [square(1000, 1000, 50)]}, "outside the slide of 200 x 100 px"),
        ("[" * 5000 + "]" * 5000, "nested"),
    ],
)
def test_what_is_no_area_of_this_slide(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        region(tmp_path, content)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P"])
@pytest.mark.parametrize("scale", [1, 0.5])
def test_masks_of_any_scale(tmp_path, mode, scale):
    mask = np.zeros((100, 200), dtype=np.uint8)
    mask[5:85, 5:85] = 255 if mode != "L" else 1  # a label
    mask[40:60, 40:60] = 0
    image = Image.fromarray(mask).convert(mode)
    image.resize((round(200 * scale), round(100 * scale)), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    assert read_region(tmp_path / "mask.png", SIZE).contains(POINTS).tolist() == [True, False, False, False]


def test_masks_that_are_none(tmp_path):
    for name, image in (
        ("shape", Image.new("L", (100, 100), 255)),
        ("black", Image.new("L", SIZE)),
        ("picture", Image.new("RGB", SIZE, (240, 200, 220))),
        ("clear", Image.new("RGBA", SIZE)),
    ):
        image.save(tmp_path / f"{name}.png")
    for name, message in (
        ("shape", "another shape than the slide"),
        ("black", "black everywhere"),
        ("picture", "black nowhere"),
        ("clear", "transparent"),
    ):
        with pytest.raises(ValueError, match=message):
            read_region(tmp_path / f"{name}.png", SIZE)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text\.png is not an image"):
        read_region(tmp_path / "text.png", SIZE)
    with pytest.raises(FileNotFoundError, match="--region should be"):
        read_region(tmp_path / "none.geojson", SIZE)
