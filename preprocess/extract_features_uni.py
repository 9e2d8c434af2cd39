"""Extract features of the frozen patch encoder: patches, target, neighbor and token caches (HDF5, one file per slide).

python preprocess/extract_features_uni.py --config her2st/dml --mode internal --extract_mode target
python preprocess/extract_features_uni.py --config her2st/dml --mode internal --extract_mode neighbor
python preprocess/extract_features_uni.py --config her2st/dml --mode internal --extract_mode all
python preprocess/extract_features_uni.py --mode external --extract_mode target --test_name 10x_breast_ff1

Slides whose caches are there and valid are skipped, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that `python preprocess/x.py` works

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import argparse
import shlex
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from datasets.features.encoding import VIEW_COUNTS, default_workers
from datasets.features.patch_encoder import PRECISIONS, BatchedPatchEncoder
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.spec import DatasetSpec
from models.patch_encoders.build import PatchEncoder, build_patch_encoder
from preprocess.extraction.extract import extract
from preprocess.extraction.plan import ExtractionSettings
from preprocess.extraction.pixels import choose_slides
from utils.cli import run, say
from utils.config import LARGE, Config, Data, load_config
from utils.devices import device_from
from utils.files import safe_name
from utils.flags import CommandLine, Flag, parse_names
from utils.parallel.team import own_device, place_of_this_process

T = TypeVar("T")
KINDS_OF_MODE = {
    "target": ("target",),
    "neighbor": ("neighbor",),
    "token": ("token",),
    "patch": ("patch",),
    "all": ("target", "neighbor", "token"),
}
_TOKEN_FLAGS = ("views", "token_pool", "dtype")
_SHARED_FLAGS = (
    *(
        "config",
        "mode",
        "test_name",
        "num_n",
        "match_mpp",
        "data_dir",
        "model_size",
        "encoder",
        "weights",
        "random_weights",
    ),
    *("gpu", "device", "precision", "batch_size"),
)  # of this command that a repairing command repeats

MODES = {"internal": "a data set for training and its test", "external": "an external test set"}
BOTH = tuple(MODES)
# fmt: off
SLIDES = (
    Flag("config", BOTH, "configuration below config/, e.g. her2st/dml, or a YAML file", needed_by=("internal",),
         also="config_name"),
    Flag("extract_mode", BOTH, "what to make; all: target, neighbor and token", choices=tuple(KINDS_OF_MODE),
         needed_by=BOTH),
    Flag("test_name", ("external",), "external test set, a folder below <data_dir>/test", needed_by=("external",)),
    Flag("slides", BOTH, "only these, comma separated, e.g. A1,B2", kind=parse_names),
    Flag("overwrite", BOTH, "make caches again that are there", kind=bool),
    Flag("parallel", BOTH, "other processes make caches of the same set; each takes free slides (torchrun: always)", kind=bool),
    Flag("data_dir", BOTH, "folder of the data sets", "DATA.data_dir"),
    Flag("num_n", BOTH, "neighbor tiles a side (default: of the configuration, 5)", "DATA.num_neighbors", int),
    Flag("match_mpp", BOTH, "scale patches this wide in micrometres (as the training of a run needs)", "DATA.patch_um", float,
         metavar="UM"),
    Flag("set", BOTH, "any configuration key", is_repeated=True, metavar="SECTION.key=value"),
    Flag("num_workers", BOTH, "threads that crop patches (default: from the number of cores)", kind=int),
)
PATCH_ENCODER = (
    Flag("encoder", BOTH, "frozen patch encoder (default: uni)", "DATA.encoder"),
    Flag("model_size", BOTH, "large: UNI2-h", choices=("base", "large"), presets={"large": LARGE}),
    Flag("weights", BOTH, "file of the patch encoder's weights", "DATA.weights"),
    Flag("allow_download", BOTH, "ask the hub for weights that are not here", kind=bool),
    Flag("random_weights", BOTH, "an untrained patch encoder, for trials", kind=bool),
    Flag("gpu", BOTH, "index of the CUDA device", kind=int),
    Flag("device", BOTH, "any PyTorch device, e.g. cpu"),
    Flag("batch_size", BOTH, "images that pass the patch encoder at a time (default: 256 on CUDA, 32 on the CPU)", kind=int),
    Flag("precision", BOTH, "default: auto, that is float32 on the CPU, bf16 on CUDA", choices=PRECISIONS),
)
TOKEN_CACHE = (
    Flag("views", BOTH, "dihedral views of each patch (default: 8)", kind=int, choices=VIEW_COUNTS),
    Flag("token_pool", BOTH, "mean-pool N x N patch tokens (default: 1)", kind=int, metavar="N"),
    Flag("dtype", BOTH, "of the tokens on disk (default: float16)", choices=("float16", "float32")),
)
# fmt: on


def conflicts(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a message for all flags that contradict each other, or that mean nothing."""
    if arguments.model_size == "large" and arguments.encoder not in (None, "uni2-h"):
        yield f"--model_size large means --encoder uni2-h, but --encoder {arguments.encoder} is given."
    given = [f"--{flag}" for flag in _TOKEN_FLAGS if getattr(arguments, flag) is not None]
    kinds = KINDS_OF_MODE.get(arguments.extract_mode)
    if given and kinds and "token" not in kinds:
        yield f"{', '.join(given)} shape the token cache, but --extract_mode is {arguments.extract_mode}."
    if arguments.parallel and arguments.overwrite:
        yield "--overwrite with --parallel: each process would make again what another has made. Give --slides to each instead."
    if arguments.slides == []:
        yield "--slides names no slide."
    if arguments.num_workers is not None and arguments.num_workers < 0:
        yield f"--num_workers should be 0 or more, found {arguments.num_workers}."


COMMAND_LINE = CommandLine(
    program="preprocess/extract_features_uni.py",
    about=__doc__,
    modes=MODES,
    groups={"slides": SLIDES, "patch encoder": PATCH_ENCODER, "token cache": TOKEN_CACHE},
    conflicts=conflicts,
    default_mode="internal",
)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, compose, extract.

    words: of the command line, without the program's name; those of this process by default.
    Raises ValueError or FileNotFoundError for whatever the user can mend, with what is wrong and what to do.
    """
    words = [*(sys.argv[1:] if words is None else words)]
    arguments = COMMAND_LINE.parse([*words, "--parallel"] if place_of_this_process().size > 1 else words)
    kinds = KINDS_OF_MODE[arguments.extract_mode]
    config, spec = resolve(arguments)
    layout = Layout(
        config.DATA.data_dir,
        spec,
        arguments.test_name,
        patch_size=config.DATA.patch_size,
        num_neighbors=config.DATA.num_neighbors,
        encoder=config.DATA.encoder,
        patch_um=config.DATA.patch_um,
    )
    slides = choose_slides(layout, arguments.slides, kinds)
    patch_encoder = encoder = None
    if kinds != ("patch",):
        patch_encoder = _build_patch_encoder(config, arguments)
        device = own_device(arguments.gpu, arguments.device) or device_from(arguments.gpu, arguments.device)
        encoder = _patch_encoder_on(patch_encoder, device, arguments)
        say(
            f"Encoder {patch_encoder.name} on {encoder.device} ({encoder.precision}), "
            f"weights {patch_encoder.weights_sha256[:12]}"
        )
    settings = ExtractionSettings(
        kinds=kinds,
        num_workers=_or_default(arguments.num_workers, default_workers()),
        command=_command(arguments),
        overwrite=arguments.overwrite,
        views=_or_default(arguments.views, ExtractionSettings.views),
        token_pool=_or_default(arguments.token_pool, ExtractionSettings.token_pool),
        token_dtype=_or_default(arguments.dtype, ExtractionSettings.token_dtype),
        is_shared=arguments.parallel,
        num_processes=place_of_this_process().size,
    )
    extract(layout, slides, patch_encoder, encoder, settings)


def resolve(arguments: argparse.Namespace) -> tuple[Config, DatasetSpec]:
    """The configuration and the data set that the flags mean.

    An external set without --config takes the configuration of the data set whose models it is meant for.
    """
    overrides = COMMAND_LINE.overrides(arguments)
    if arguments.mode == "internal":
        config = load_config(arguments.config, overrides)
        return config, get_spec(config.DATA.type, config.DATA.data_dir)
    test_name = safe_name(arguments.test_name, "Test set")
    data_dir = arguments.data_dir or Data.data_dir
    if arguments.config is not None:
        config = load_config(arguments.config, overrides)
        return config, get_spec(test_name, config.DATA.data_dir)
    spec = get_spec(test_name, data_dir)
    if spec.training_type is None:
        raise ValueError(
            f"It is not known with which data set's models {test_name} is tested (its dataset.yaml has no training_type); "
            "give --config, for example --config her2st/dml."
        )
    return load_config(f"{spec.training_type}/dml", overrides), spec


def _build_patch_encoder(config: Config, arguments: argparse.Namespace) -> PatchEncoder:
    return build_patch_encoder(
        config.DATA.encoder,
        config.DATA.weights,
        allow_download=arguments.allow_download,
        random_weights=arguments.random_weights,
    )


def _patch_encoder_on(
    patch_encoder: PatchEncoder, device: torch.device, arguments: argparse.Namespace
) -> BatchedPatchEncoder:
    return BatchedPatchEncoder(
        patch_encoder.to(device),
        device,
        prefix_tokens=patch_encoder.spec.prefix_tokens,
        batch_size=arguments.batch_size,
        precision=_or_default(arguments.precision, "auto"),
    )


def _or_default(value: T | None, default: T) -> T:
    return default if value is None else value


def _command(arguments: argparse.Namespace) -> str:
    """This command without the slides and kinds, to be completed in messages."""
    parts = ["python", "preprocess/extract_features_uni.py"]
    for flag in _SHARED_FLAGS:
        value = getattr(arguments, flag)
        if value is True:
            parts.append(f"--{flag}")
        elif value is not None and value is not False:
            parts += [f"--{flag}", str(value)]
    for override in arguments.set or ():
        parts += ["--set", override]
    return shlex.join(parts)


if __name__ == "__main__":
    run(main)
