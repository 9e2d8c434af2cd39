"""Checkpoints of the published code under our names."""

from __future__ import annotations

import re

import pytest
import torch

from models.import_reference import import_reference, translate_name


@pytest.fixture
def published(golden, tools):
    """Recorded learned parameters, by their published names."""
    return tools.below(tools.as_tensors(golden("genedml_train")), "param/")


def test_every_recorded_name_becomes_one_of_ours_and_the_model_loads(golden, tools, published):
    imported = import_reference(published)
    assert len(imported) == len(published)
    model = tools.recorded_model(tools.as_tensors(golden("genedml_train")))
    assert set(imported) == set(model.state_dict())
    for name, value in published.items():
        assert torch.equal(model.state_dict()[translate_name(name)], value)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model."])
def test_prefixes_of_wrappers_are_stripped(published, prefix):
    wrapped = {prefix + name: value for name, value in published.items()}
    assert import_reference(wrapped).keys() == import_reference(published).keys()
    assert import_reference({"state_dict": wrapped, "epoch": 3}).keys() == import_reference(published).keys()


@pytest.mark.parametrize("module", ["image_encoder.feature_extractor", "patch_encoder", "image_encoder.uni.model"])
def test_the_frozen_patch_encoder_is_left_out(published, module):
    parts = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"]
    frozen = {f"{module}.{part}": torch.zeros(1) for part in parts}
    assert import_reference(published | frozen).keys() == import_reference(published).keys()


def test_the_index_buffer_is_checked_and_left_out(golden, published):
    name = "image_encoder.neighbor_encoder.layer.layers.0.0.fn.attention_bias_idxs"
    index = torch.from_numpy(golden("neighbor_encoder")["bias_index"]).long()
    assert import_reference(published | {name: index}).keys() == import_reference(published).keys()
    with pytest.raises(ValueError, match=r"relative positions .* another way"):
        import_reference(published | {name: index.flip(0)})


def test_unknown_and_missing_names_are_listed_together(published):
    broken = dict(published)
    del broken["image_encoder.neighbor_encoder.layer.layers.1.1.norm.weight"]
    del broken["feature_cluster.0.bias"]
    broken["image_encoder.fc_layer.scale"] = torch.zeros(1)
    broken["something.else"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        import_reference(broken)
    message = str(caught.value)
    assert "2 names are unknown: image_encoder.fc_layer.scale, something.else" in message
    assert "cluster_head.bias, neighbor_encoder.layers.1.feed_forward_norm.weight" in message


def test_a_learned_module_is_never_taken_for_a_frozen_one(published):
    odd = "image_encoder.neighbor_encoder.blocks.0.weight"
    with pytest.raises(ValueError, match=rf"1 names are unknown: {re.escape(odd)}"):
        import_reference(published | {odd: torch.zeros(1)})


def test_an_empty_or_foreign_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"not a whole checkpoint .*\n\d+ parameters are missing"):
        import_reference({})
