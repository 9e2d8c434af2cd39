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

import argparse
import shlex

import torch

from datasets.features.encoding import VIEW_COUNTS, default_workers
from datasets.features.patch_encoder import PRECISIONS, BatchedPatchEncoder
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.spec import DatasetSpec
from models.patch_encoders.build import PatchEncoder, build_patch_encoder
from preprocess.extraction.extract import ExtractionSettings, choose_slides, extract
from utils.cli import run, say
from utils.config import LARGE, Config, Data, load_config
from utils.devices import device_from
from utils.files import safe_name

KINDS_OF_MODE = {
    "target": ("target",),
    "neighbor": ("neighbor",),
    "token": ("token",),
    "patch": ("patch",),
    "all": ("target", "neighbor", "token"),
}
KEY_OF_FLAG = {
    "data_dir": "DATA.data_dir",
    "encoder": "DATA.encoder",
    "weights": "DATA.weights",
    "num_n": "DATA.num_neighbors",
}
_TOKEN_FLAGS = {"dtype": "float16", "views": 8, "token_pool": 1}
_SHARED_FLAGS = (
    *("config", "mode", "test_name", "num_n", "data_dir", "model_size", "encoder", "weights", "random_weights"),
    *("gpu", "device", "precision", "batch_size"),
)  # of this command that a repairing command repeats


def build_parser() -> argparse.ArgumentParser:
    """The flags of an extraction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="configuration below config/, e.g. her2st/dml, or a YAML file")
    parser.add_argument("--mode", choices=("internal", "external"), default="internal", help="default: internal")
    parser.add_argument(
        "--extract_mode",
        choices=tuple(KINDS_OF_MODE),
        required=True,
        help="what to make; all: target, neighbor and token",
    )
    parser.add_argument("--test_name", help="external test set below <data_dir>/test")
    parser.add_argument("--slides", help="only these, comma separated, e.g. A1,B2")
    parser.add_argument("--overwrite", action="store_true", help="make caches again that are there")
    parser.add_argument("--data_dir", help="folder of the data sets")
    parser.add_argument("--num_n", type=int, help="neighbor tiles a side (default: of the configuration, 5)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.key=value", help="any configuration key")
    _add_encoder_flags(parser.add_argument_group("encoder"))
    token = parser.add_argument_group("token cache")
    token.add_argument("--views", type=int, choices=VIEW_COUNTS, help="dihedral views of each patch (default: 8)")
    token.add_argument("--token_pool", type=int, metavar="N", help="mean-pool N x N patch tokens (default: 1)")
    token.add_argument("--dtype", choices=("float16", "float32"), help="of the tokens on disk (default: float16)")
    return parser


def _add_encoder_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--encoder", help="frozen patch encoder (default: uni)")
    group.add_argument("--model_size", choices=("base", "large"), help="large: UNI2-h")
    group.add_argument("--weights", help="file of the encoder's weights")
    group.add_argument("--allow_download", action="store_true", help="ask the hub for weights that are not here")
    group.add_argument("--random_weights", action="store_true", help="an untrained encoder, for trials")
    group.add_argument("--gpu", type=int, help="index of the CUDA device")
    group.add_argument("--device", help="any PyTorch device, e.g. cpu")
    group.add_argument("--batch_size", type=int, help="images that pass the encoder at a time")
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: float32 on the CPU, bf16 on CUDA")
    group.add_argument("--num_workers", type=int, default=default_workers(), help="threads that crop patches")


def main(argv: list[str] | None = None) -> None:
    """Read the command line, compose, extract."""
    arguments = build_parser().parse_args(argv)
    kinds = KINDS_OF_MODE[arguments.extract_mode]
    _check_flags(arguments, kinds)
    config, spec = resolve(arguments)
    layout = Layout(
        config.DATA.data_dir,
        spec,
        arguments.test_name,
        patch_size=config.DATA.patch_size,
        num_neighbors=config.DATA.num_neighbors,
    )
    requested = [name.strip() for name in arguments.slides.split(",") if name.strip()] if arguments.slides else None
    slides = choose_slides(layout, requested, kinds)
    patch_encoder = encoder = None
    if kinds != ("patch",):
        patch_encoder = _build_patch_encoder(config, arguments)
        encoder = _patch_encoder_on(patch_encoder, device_from(arguments.gpu, arguments.device), arguments)
        say(
            f"Encoder {patch_encoder.name} on {encoder.device} ({encoder.precision}), "
            f"weights {patch_encoder.weights_sha256[:12]}"
        )
    variant = {flag: _given(arguments, flag, default) for flag, default in _TOKEN_FLAGS.items()}
    settings = ExtractionSettings(
        kinds=kinds,
        num_workers=arguments.num_workers,
        command=_command(arguments),
        overwrite=arguments.overwrite,
        views=variant["views"],
        token_pool=variant["token_pool"],
        token_dtype=variant["dtype"],
    )
    extract(layout, slides, patch_encoder, encoder, settings)


def _check_flags(arguments: argparse.Namespace, kinds: tuple[str, ...]) -> None:
    """Flags that would be ignored, or that contradict each other, are errors; all in one message."""
    problems = []
    if arguments.mode == "external" and arguments.test_name is None:
        problems.append("--mode external needs --test_name, the folder below <data_dir>/test.")
    if arguments.mode == "internal" and arguments.test_name is not None:
        problems.append(f"--test_name {arguments.test_name} is for --mode external.")
    if arguments.mode == "internal" and arguments.config is None:
        problems.append("--mode internal needs --config, for example --config her2st/dml.")
    if arguments.model_size == "large" and arguments.encoder not in (None, "uni2-h"):
        problems.append(f"--model_size large means --encoder uni2-h, but --encoder {arguments.encoder} is given.")
    given = [f"--{flag}" for flag in _TOKEN_FLAGS if getattr(arguments, flag) is not None]
    if given and "token" not in kinds:
        problems.append(f"{', '.join(given)} shape the token cache, but --extract_mode is {arguments.extract_mode}.")
    if arguments.slides is not None and not arguments.slides.strip(", "):
        problems.append("--slides names no slide.")
    if arguments.num_workers < 0:
        problems.append(f"--num_workers should be 0 or more, found {arguments.num_workers}.")
    if problems:
        raise ValueError("\n".join(problems))


def resolve(arguments: argparse.Namespace) -> tuple[Config, DatasetSpec]:
    """The configuration and the data set that the flags mean.

    An external set without --config takes the configuration of the data set whose models it is meant for.
    """
    overrides = list(LARGE) if arguments.model_size == "large" else []
    overrides += [f"{key}={v}" for flag, key in KEY_OF_FLAG.items() if (v := getattr(arguments, flag)) is not None]
    overrides += arguments.set
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
        precision=arguments.precision,
    )


def _given(arguments: argparse.Namespace, flag: str, default: object) -> object:
    value = getattr(arguments, flag)
    return default if value is None else value


def _command(arguments: argparse.Namespace) -> str:
    """This command without the slides and kinds, to be completed in messages."""
    parser, parts = build_parser(), ["python", "preprocess/extract_features_uni.py"]
    for flag in _SHARED_FLAGS:
        value = getattr(arguments, flag)
        if value is True:
            parts.append(f"--{flag}")
        elif value is not None and value is not False and (flag == "mode" or value != parser.get_default(flag)):
            parts += [f"--{flag}", str(value)]
    for override in arguments.set:
        parts += ["--set", override]
    return shlex.join(parts)


if __name__ == "__main__":
    run(main)
