"""The highly predictive list, made by the reference model of the split, against a naive one out of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from evaluation.gene_lists import HeldOutPatient, highly_predictive_list
from evaluation.metrics import pearson
from modes.training.split import REFERENCE_PENALTIES, reference_predictions


@pytest.fixture
def training():
    """Three patients with two slides; genes 0-3 follow the features with falling strength, the others are noise."""
    generator = np.random.default_rng(0)
    patients = np.repeat(["P", "Q", "R"], 60)
    slides = np.char.add(patients, np.tile(np.repeat(["1", "2"], 30), 3))
    features = generator.normal(size=(180, 12)) * np.linspace(3, 0.5, 12)
    weights = generator.normal(size=(12, 4)) / 3
    expression = generator.normal(size=(180, 10))
    expression[:, :4] += features @ weights * np.array([4, 2, 1, 0.5])
    expression += 3 * np.array([{"P": 0, "Q": 1, "R": -1}[p] for p in patients])[:, None]
    return features, expression, patients, slides


def predictive(features, expression, patients, genes, size=None, *, slides=None, **more):
    """The list of `_gene_lists`, from arrays."""
    arrays = torch.from_numpy(features), torch.from_numpy(expression)
    names = [list(map(str, labels)) for labels in (patients, patients if slides is None else slides)]
    return highly_predictive_list(reference_predictions(*arrays, *names, **more), genes, size)


def test_highly_predictive_list_equals_a_naive_one(training):
    features, expression, patients, slides = training
    genes = [f"g{i}" for i in range(10)]
    scores = np.zeros((len(REFERENCE_PENALTIES), 10))
    for held_out in "PQR":
        test = patients == held_out
        pca = PCA(5, svd_solver="full").fit(features[~test])
        scale = (pca.explained_variance_ * ((~test).sum() - 1)).mean()
        for index, penalty in enumerate(REFERENCE_PENALTIES):
            ridge = Ridge(alpha=penalty * scale).fit(pca.transform(features[~test]), expression[~test])
            predicted = ridge.predict(pca.transform(features[test]))
            for name in sorted(set(slides[test])):
                rows = slides[test] == name
                scores[index] += pearson(expression[test][rows], predicted[rows]) / 6
    best = scores[np.argmax(scores.mean(axis=1))]
    expected = [genes[i] for i in np.argsort(-best)]
    assert set(expected[:4]) == {"g0", "g1", "g2", "g3"}
    assert predictive(features, expression, patients, genes, 10, slides=slides, components=5) == expected
    assert predictive(features, expression, patients, genes, slides=slides, components=5) == expected[:2]


def test_highly_predictive_list_with_fewer_spots_than_features_and_constant_genes(training):
    features, expression, patients, _ = training
    wide = np.hstack([features] * 20)[::9]
    expression = expression[::9].copy()
    expression[:, 0] = 1.0
    genes = [f"g{i}" for i in range(10)]
    chosen = predictive(wide, expression, patients[::9], genes, 10)
    assert chosen[-1] == "g0"  # undefined ranks last
    with pytest.raises(ValueError, match="no gene of 10 has a defined PCC"):
        predictive(wide, np.ones_like(expression), patients[::9], genes)


def test_highly_predictive_list_refuses(training):
    features, expression, patients, _ = training
    genes = [f"g{i}" for i in range(10)]
    with pytest.raises(ValueError, match=r"found only \['P'\]; expected at least two training patients"):
        predictive(features, expression, ["P"] * 180, genes)
    with pytest.raises(ValueError, match="expected as many spots in each and 10 genes"):
        highly_predictive_list([HeldOutPatient("P", patients[:5], expression, expression[None])], genes)
    with pytest.raises(ValueError, match="the same for every training spot"):
        predictive(np.ones_like(features), expression, patients, genes)


def test_a_patient_has_no_say_in_its_own_predictions(training):
    features, expression, patients, _ = training
    labels = patients.tolist()

    def of_r(expression):
        parts = reference_predictions(torch.from_numpy(features), torch.from_numpy(expression), labels, labels)
        return next(part.predicted for part in parts if part.patient == "R")

    before, changed = of_r(expression), expression.copy()
    changed[patients == "R"] = 99.0
    np.testing.assert_allclose(of_r(changed), before, atol=1e-9)
    changed[patients == "P"] = 99.0
    assert np.abs(of_r(changed) - before).max() > 1
