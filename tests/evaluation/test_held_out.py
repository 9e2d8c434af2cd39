"""What held-out patients have shown: quantiles against a slow one, coverage on simulated patients, the file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from evaluation.held_out import coverage_of, half_widths, write_held_out
from evaluation.predictions import HELD_OUT_FILE as FILE
from evaluation.predictions import HeldOut, read_held_out


def patients(shift: float, generator: np.random.Generator, count: int = 8) -> dict[str, np.ndarray]:
    """|residuals| (N, 20) of patients of different size, each with errors of its own that grow with `shift`."""
    found = {}
    for index in range(count):
        spots = int(generator.integers(40, 200))
        found[f"P{index}"] = np.abs(generator.normal(size=(spots, 20)) + shift * generator.normal(size=20))
    return found


def test_half_widths_equal_a_slow_quantile_that_weighs_patients_alike():
    generator = np.random.default_rng(0)
    parts = [generator.random((n, 3)) for n in (5, 11, 40)]
    parts[1][:, 2] = np.nan  # a gene that a fold does not have
    found = half_widths(parts, 0.7)
    for gene in range(3):
        known = [part[:, gene] for part in parts if not np.isnan(part[:, gene]).all()]

        def share(limit, known=known):
            return np.mean([(values <= limit).mean() for values in known])

        slow = min(limit for limit in np.concatenate(known) if share(limit) >= 0.7 - 1e-9)
        assert found[gene] == slow
    assert np.isnan(half_widths([np.full((4, 1), np.nan)])).all()


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_coverage_is_near_the_level_on_simulated_patients(shift):
    coverage = coverage_of(patients(shift, np.random.default_rng(1)))
    assert len(coverage) == 8 and 0.75 < np.mean(list(coverage.values())) < 0.85


def test_a_patient_that_is_unlike_the_others_is_not_covered():
    found = patients(0.0, np.random.default_rng(2))
    found["P0"] = found["P0"] + 3
    coverage = coverage_of(found)
    assert coverage["P0"] < 0.1 and coverage["P1"] > 0.8
    assert coverage_of({"P0": found["P0"]}) == {}, "nobody is left to learn from"


def test_the_file_is_read_as_it_was_written(tmp_path):
    assert read_held_out(tmp_path) is None
    held = HeldOut("run", ["A", "B"], ["G", "H"], [0.5, 0.25], [0.1, 0.2], 0.8, [0.3, 0.4], {"A": 0.78, "B": 0.82})
    write_held_out(tmp_path, held)
    assert read_held_out(tmp_path) == held
    np.testing.assert_array_equal(held.values_of("pcc", ["H", "X"]), [0.25, math.nan])
    assert "held 80.0 % of the spots of a patient left out, mean over genes and 2 patients (78.0 to 82.0 %)" in str(
        held.describe()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes": 3}, "lists no genes"),
        ({"pcc": [1.0]}, "pcc should be a list of 2 numbers"),
        ({"pcc": [1.0, "high"]}, "pcc should hold numbers, found 'high'"),
        ({"level": 7}, "level a share"),
        ({"coverage": []}, "coverage should be a table"),
    ],
)
def test_another_file_is_refused(tmp_path, change, message):
    content = {"genes": ["G", "H"], "pcc": [0, 0], "pcc_std": [0, None], "half_width": [], "level": 0.8, "coverage": {}}
    (tmp_path / FILE).write_text(json.dumps(content))
    assert math.isnan(read_held_out(tmp_path).pcc_std[1])
    (tmp_path / FILE).write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        read_held_out(tmp_path)
