"""State dicts of the published Gene-DML code, under our names.

Only names change; every array stays as it is. The frozen patch encoder that such a checkpoint carries is left out,
because ours come from `models.patch_encoders.build` with a verified weight file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor

from models.layers.attention import relative_offset_index
from utils.text import some

# What training wrappers put before every name.
WRAPPER_PREFIXES = ("module.", "model.", "_orig_mod.")
# Buffer of the published relative bias: the index that we compute ourselves. Checked, not kept.
INDEX_BUFFER = re.compile(r"(^|\.)attention_bias_idxs$")
# First parts of a vision transformer or a residual network, below whatever name the checkpoint gives it.
PATCH_ENCODER_PART = re.compile(
    r"^(?:image_encoder\.)?(?P<module>\w+)\.(?:[\w]+\.)*?"
    r"(?:cls_token|pos_embed|reg_token|patch_embed\.|blocks\.\d+\.|conv1\.weight|bn1\.|layer1\.\d+\.conv\d)"
)
LEARNED_MODULES = {
    "fc_layer", "neighbor_encoder", "global_encoder", "gene_encoder", "trans_encoder", "target_predictor",
    "neighbor_predictor", "global_predictor", "fusion_predictor", "feature_cluster",
}  # fmt: skip

_LAYER_PARTS = {
    "0.norm": "attention_norm",
    "0.fn.to_qkv": "attention.to_qkv",
    "0.fn.to_out.0": "attention.project.0",
    "1.norm": "feed_forward_norm",
    "1.fn.net.0": "feed_forward.expand",
    "1.fn.net.3": "feed_forward.contract",
}
_STACKS = (
    (re.compile(r"^image_encoder\.neighbor_encoder\.layer\.layers\.(\d+)\."), "neighbor_encoder.layers.{}", 0),
    (re.compile(r"^image_encoder\.global_encoder\.layer1\.layers\.(0)\."), "global_encoder.layers.{}", 0),
    (re.compile(r"^image_encoder\.global_encoder\.layer2\.layers\.(\d+)\."), "global_encoder.layers.{}", 1),
    (re.compile(r"^trans_encoder\.0\.layers\.(0)\."), "fusion.layer", 0),
)
_MODULES = {
    "image_encoder.fc_layer": "projection",
    "image_encoder.neighbor_encoder.norm": "neighbor_encoder.norm",
    "image_encoder.global_encoder.pos_layer.proj1": "global_encoder.position",
    "image_encoder.global_encoder.norm": "global_encoder.norm",
    "trans_encoder.1.net.0": "fusion.feed_forward.expand",
    "trans_encoder.1.net.3": "fusion.feed_forward.contract",
    "gene_encoder.0.projection": "gene_encoder.projection",
    "gene_encoder.0.fc": "gene_encoder.hidden",
    "gene_encoder.0.layer_norm": "gene_encoder.norm",
    "gene_encoder.1.net.0": "gene_encoder.feed_forward.expand",
    "gene_encoder.1.net.3": "gene_encoder.feed_forward.contract",
    "feature_cluster.0": "cluster_head",
    **{f"fusion_predictor.{index}": f"fused_predictor.{index}" for index in (0, 3, 6)},
    **{
        f"{scale}_predictor.{index}": f"scale_predictors.{scale}.{index}"
        for scale in ("target", "neighbor", "global")
        for index in (0, 3)
    },
}


def translate_name(name: str) -> str | None:
    """Our name of a learned parameter of the published code, or None if it has none of that name."""
    module, _, kind = name.rpartition(".")
    if module in _MODULES and kind in ("weight", "bias"):
        return f"{_MODULES[module]}.{kind}"
    for pattern, ours, shift in _STACKS:
        match = pattern.match(name)
        if not match:
            continue
        stack = ours.format(int(match.group(1)) + shift)
        part, _, kind = name[match.end() :].rpartition(".")
        if (part, kind) == ("0.fn", "attention_biases"):
            return f"{stack}.attention.bias_table"
        if part in _LAYER_PARTS and kind in ("weight", "bias"):
            return f"{stack}.{_LAYER_PARTS[part]}.{kind}"
    return None


def import_reference(state_dict: Mapping[str, Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rename the learned parameters of a checkpoint of the published code.

    state_dict: as saved, possibly below a key "state_dict", possibly with prefixes such as `module.`, possibly with the
    frozen patch encoder (left out). Returns a state dict that `GeneDML.load_state_dict` accepts when the sizes agree.
    Raises ValueError that lists all names that are unknown and all that are missing.
    """
    inner = state_dict.get("state_dict", state_dict)
    named = {_without_wrappers(name): value for name, value in cast(Mapping[str, Tensor], inner).items()}
    frozen = {match["module"] for match in map(PATCH_ENCODER_PART.match, named) if match} - LEARNED_MODULES
    imported, unknown = {}, []
    for name, value in named.items():
        ours = translate_name(name)
        if ours is not None:
            imported[ours] = value
        elif INDEX_BUFFER.search(name):
            _check_index(name, value)
        elif _module_of(name) not in frozen:
            unknown.append(name)
    missing = sorted(_expected(imported) - set(imported))
    if unknown or missing:
        raise ValueError(_complaint(unknown, missing))
    return imported


def _without_wrappers(name: str) -> str:
    for prefix in WRAPPER_PREFIXES:
        if name.startswith(prefix):
            return _without_wrappers(name[len(prefix) :])
    return name


def _module_of(name: str) -> str:
    return name.removeprefix("image_encoder.").split(".")[0]


def _check_index(name: str, index: Tensor) -> None:
    side = round(index.shape[-1] ** 0.5)
    if side**4 != index.numel() or not torch.equal(index.cpu().long(), relative_offset_index(side)):
        raise ValueError(
            f"The checkpoint orders the relative positions of its neighbors in another way ({name}, shape "
            f"{tuple(index.shape)}) than 5*|row offset| + |column offset|. It cannot be imported."
        )


def _layer_names(stack: str, *, bias_table: bool = False, projected: bool = True) -> set[str]:
    parts = [part for part in _LAYER_PARTS.values() if projected or part != "attention.project.0"]
    names = {f"{stack}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    names.discard(f"{stack}.attention.to_qkv.bias")
    return names | ({f"{stack}.attention.bias_table"} if bias_table else set())


def _depth(names: Iterable[str], stack: str) -> int:
    """Number of layers up to the highest index there is, at least one."""
    found = [re.match(rf"{re.escape(stack)}\.(\d+)\.", name) for name in names]
    return max((int(match.group(1)) for match in found if match), default=0) + 1


def _expected(imported: Mapping[str, Tensor]) -> set[str]:
    """Every name that a whole model of this depth has."""
    names = {f"{module}.{kind}" for module in _MODULES.values() for kind in ("weight", "bias")}
    for layer in range(_depth(imported, "neighbor_encoder.layers")):
        names |= _layer_names(f"neighbor_encoder.layers.{layer}", bias_table=True)
    for layer in range(_depth(imported, "global_encoder.layers")):
        names |= _layer_names(f"global_encoder.layers.{layer}")
    # A fusion layer of one head has no output projection; one of several heads has both its weight and its bias.
    projected = any(name.startswith("fusion.layer.attention.project") for name in imported)
    return names | _layer_names("fusion.layer", projected=projected)


def _complaint(unknown: list[str], missing: list[str]) -> str:
    lines = ["This is not a whole checkpoint of the published Gene-DML code."]
    if unknown:
        lines.append(f"{len(unknown)} names are unknown: {some(unknown, 8)}.")
    if missing:
        lines.append(f"{len(missing)} parameters are missing (named as here): {some(missing, 8)}.")
    lines.append(
        "Give the file that its training wrote, with all learned parameters; a checkpoint of ours needs no import."
    )
    return "\n".join(lines)
