"""Helpers of the model tests: relative errors, sizes read from recorded arrays, models that carry them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.contract import Sizes
from models.gene_dml import GeneDML, build_gene_dml
from models.import_reference import import_reference, translate_name

VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 3e-4
# Numbers of the recording that no array holds (README of tests/golden, sections 1 to 3).
GLOBAL_HEADS = 8


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The numeric arrays of a recording as tensors."""
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items() if array.dtype.kind in "fiu"}


def below(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def close(found: Tensor, expected: Tensor, *, tolerance: float = VALUE_TOLERANCE) -> None:
    """Assert: greatest absolute difference / greatest absolute expected value is below the tolerance."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    difference = float((found.detach().double() - expected.detach().double()).abs().max())
    error = difference / max(float(expected.detach().abs().max()), 1e-30)
    assert error < tolerance, f"relative error {error:.2e}, tolerance {tolerance:.0e}"


def model_config(**changes: object) -> SimpleNamespace:
    """A small configuration with every key that a builder reads; dropout off unless asked for."""
    values = {
        "name": "gene_dml",
        "projection_dim": 16,
        "neighbor_depth": 2,
        "neighbor_heads": 2,
        "neighbor_mlp_ratio": 2.0,
        "neighbor_dropout": 0.0,
        "global_depth": 3,
        "global_heads": 4,
        "global_mlp_ratio": 2.0,
        "global_dropout": 0.0,
        "fusion_heads": 1,
        "fusion_mlp_dim": 32,
        "fusion_dropout": 0.0,
        "gene_dropout": 0.0,
        "gene_mlp_dim": 32,
        "gene_mlp_dropout": 0.0,
        "predictor_dim": 32,
        "predictor_dropout": 0.0,
        "use_neighbor": True,
        "use_global": True,
    }
    assert set(changes) <= set(values)
    return SimpleNamespace(**(values | changes))


def recorded_config(parameters: dict[str, Tensor]) -> tuple[SimpleNamespace, Sizes]:
    """Configuration and sizes of a recorded model, read from the shapes of its parameters."""

    def rows(name: str) -> int:
        return parameters[name].shape[0]

    def count(stack: str) -> int:
        return len({name[len(stack) :].split(".")[0] for name in parameters if name.startswith(stack)})

    encoder = "image_encoder."
    neighbor = f"{encoder}neighbor_encoder.layer.layers."
    whole = f"{encoder}global_encoder."
    width, feature_dim = parameters[f"{encoder}fc_layer.weight"].shape
    heads, offsets = parameters[f"{neighbor}0.0.fn.attention_biases"].shape
    config = model_config(
        projection_dim=width,
        neighbor_depth=count(neighbor),
        neighbor_heads=heads,
        neighbor_mlp_ratio=rows(f"{neighbor}0.1.fn.net.0.weight") / feature_dim,
        global_depth=1 + count(f"{whole}layer2.layers."),
        global_heads=GLOBAL_HEADS,
        global_mlp_ratio=rows(f"{whole}layer1.layers.0.1.fn.net.0.weight") / feature_dim,
        fusion_mlp_dim=rows("trans_encoder.1.net.0.weight"),
        gene_mlp_dim=rows("gene_encoder.1.net.0.weight"),
        predictor_dim=rows("fusion_predictor.0.weight"),
    )
    num_genes = rows("fusion_predictor.6.weight")
    return config, Sizes(feature_dim, feature_dim, num_genes, round(offsets**0.5))


def recorded_model(recording: dict[str, Tensor]) -> GeneDML:
    """The recorded model, its parameters loaded through the import of published checkpoints."""
    parameters = below(recording, "param/")
    config, sizes = recorded_config(parameters)
    model = build_gene_dml(config, sizes)
    model.load_state_dict(import_reference(parameters), strict=True)
    return model


def load_part(module: torch.nn.Module, recording: dict[str, Tensor], *, reference: str, ours: str) -> None:
    """Load a recorded piece into `module`; the prefixes say where both sit in the whole model."""
    state = {}
    for name, value in below(recording, "param/").items():
        translated = translate_name(reference + name)
        assert translated is not None and translated.startswith(ours), name
        state[translated.removeprefix(ours)] = value
    module.load_state_dict(state, strict=True)


def check_gradients(module: torch.nn.Module, recording: dict[str, Tensor], *, reference: str, ours: str) -> None:
    """Compare the gradients that `module` holds with all recorded ones; none may be left out."""
    found = {ours + name: parameter.grad for name, parameter in module.named_parameters()}
    recorded = {translate_name(reference + name): value for name, value in below(recording, "grad/").items()}
    assert recorded and set(recorded) <= set(found)
    for name, value in recorded.items():
        close(found[name], value, tolerance=GRADIENT_TOLERANCE)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The helpers of this file, for the test modules."""
    return SimpleNamespace(
        as_tensors=as_tensors,
        below=below,
        check_gradients=check_gradients,
        close=close,
        load_part=load_part,
        model_config=model_config,
        recorded_model=recorded_model,
        GRADIENT_TOLERANCE=GRADIENT_TOLERANCE,
        GLOBAL_HEADS=GLOBAL_HEADS,
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices of a few rows: a second thread costs more in waiting than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
