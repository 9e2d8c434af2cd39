"""Predictions as detections that QuPath reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.files import write_text

_CORNERS = 16  # of a circle
_DIGITS = 5


def write_detections(
    path: str | Path,
    spot_ids: Sequence[str],
    spatial_px: np.ndarray,
    diameter_px: float,
    measurements: Mapping[str, np.ndarray],
) -> Path:
    """Write N spots as a GeoJSON of QuPath detections: circles with measurements; returns the path.

    spatial_px (N, 2): centres (x, y) in full-resolution px.  diameter_px: of the circles.  measurements: name -> (N,) values;
    one that is NaN is left out of its spot.  QuPath opens the file by drag and drop, or File, Import objects from file.
    """
    turn = 2 * np.pi * np.arange(_CORNERS + 1) / _CORNERS
    circle = diameter_px / 2 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    circle[-1] = circle[0]
    features = []
    for row, (spot, center) in enumerate(zip(spot_ids, spatial_px)):
        values = {name: round(float(column[row]), _DIGITS) for name, column in measurements.items()}
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [np.round(center + circle, 2).tolist()]},
                "properties": {
                    "objectType": "detection",
                    "name": spot,
                    "measurements": {name: value for name, value in values.items() if math.isfinite(value)},
                },
            }
        )
    return write_text(path, json.dumps({"type": "FeatureCollection", "features": features}, allow_nan=False))
