"""Gene-DML: spatial gene expression from H&E images.

python main.py --config_name her2st/dml --mode train --k 18 --use_kmeans
python main.py --config_name her2st/dml --mode test --fold 0 --model_path PATH
python main.py --mode external_test --test_name 10x_breast_ff1 --model_path PATH
python main.py --mode predict --image SLIDE --model_path PATH --out FILE.h5ad
python main.py --mode doctor --config_name her2st/dml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from models.table import MODELS, find_model
from utils.cli import run, say
from utils.config import LARGE, Config, config_label, load_config
from utils.devices import device_from

MODES = ("train", "test", "external_test", "predict", "doctor", "compare", "import_reference")
# Flags that set one key of the configuration; --set SECTION.key=value sets any.
KEY_OF_FLAG = {
    "k": "LOSS.k",
    "lambda_cld": "LOSS.group_weight",
    "cld_t": "LOSS.group_temperature",
    "epochs": "TRAINING.epochs",
    "batch_size": "TRAINING.batch_size",
    "slides_per_batch": "TRAINING.slides_per_batch",
    "seed": "GENERAL.seed",
    "exp_id": "GENERAL.exp_id",
    "log_path": "GENERAL.log_path",
    "data_dir": "DATA.data_dir",
    "encoder": "DATA.encoder",
    "weights": "DATA.weights",
    "num_workers": "DATA.num_workers",
    "protocol": "EVALUATION.protocol",
    "fixed_epochs": "EVALUATION.fixed_epochs",
    "model": "MODEL.name",
}
SWITCHES = {
    "use_kmeans": "LOSS.use_kmeans=true",
    "normalize_fused": "LOSS.normalize_fused=true",
    "start_at_mean": "TRAINING.start_at_mean=true",
    "no_instance_loss": "LOSS.instance_weight=0",
    "no_group_loss": "LOSS.group_weight=0",
    "no_neighbor": "MODEL.use_neighbor=false",
    "no_global": "MODEL.use_global=false",
}
# Which modes read which flag. Of those that set the configuration, test, external_test and predict refuse what would
# change the trained model.
MODES_OF_FLAG = {
    **dict.fromkeys(("set", "model_size", *KEY_OF_FLAG, *SWITCHES), tuple(mode for mode in MODES if mode != "compare")),
    "config_name": ("train", "test", "doctor", "import_reference"),
    "log_path": ("train", "doctor"),
    "run_name": ("train", "doctor"),
    "exp_id": ("train", "doctor"),
    "fold": ("train", "test", "external_test", "predict", "doctor", "import_reference"),
    "folds": ("train",),
    "resume": ("train", "doctor"),
    "seeds": ("train",),
    "gpu": ("train", "test", "external_test", "predict", "doctor"),
    "device": ("train", "test", "external_test", "predict", "doctor"),
    "checkpoint_seconds": ("train",),
    "no_report": ("train", "test"),
    "model_path": ("test", "external_test", "predict", "doctor", "import_reference"),
    "test_name": ("external_test", "doctor"),
    "out": ("predict", "compare", "import_reference"),
    "runs": ("compare",),
    "intersect": ("compare",),
    **dict.fromkeys(
        ("image", "spots", "exchanged_pixels", "pitch_px", "pitch_um", "mpp", "match_mpp", "min_tissue", "genes"),
        ("predict",),
    ),
}
# What a mode has in place of a flag that it does not read.
INSTEAD = {
    ("folds", "test"): "takes --fold N or tests all folds",
    ("folds", "external_test"): "takes --fold N or all folds of the run",
    ("folds", "predict"): "takes --fold N or all folds of the run",
    ("folds", "doctor"): "takes --fold N or checks all folds",
    ("folds", "import_reference"): "takes --fold N",
    ("seeds", "doctor"): "takes one --seed",
    ("config_name", "external_test"): "finds the configuration in the checkpoint",
    ("config_name", "predict"): "finds the configuration in the checkpoint",
    ("config_name", "compare"): "finds the configurations in the runs",
    ("model_path", "train"): "goes on with a run by --resume",
    ("model_path", "compare"): "takes --runs",
    ("out", "train"): "writes to --log_path and --run_name",
    ("out", "test"): "writes beside the checkpoint",
    ("out", "external_test"): "writes below the run",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of all modes; `MODES_OF_FLAG` says which of them reads what."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--mode", required=True, choices=MODES, help="what to do")
    parser.add_argument("--config_name", help="configuration below config/, e.g. her2st/dml, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.key=value", help="any configuration key")
    _add_run_flags(parser.add_argument_group("run"))
    _add_method_flags(parser.add_argument_group("method"))
    _add_predict_flags(parser.add_argument_group("prediction of a slide"))
    return parser


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data_dir", help="folder of the data sets")
    group.add_argument("--log_path", help="folder of the runs")
    group.add_argument("--run_name", help="name of the run folder (default: exp_<exp_id>)")
    group.add_argument("--exp_id", type=int, help="number of the run (default: 0)")
    group.add_argument("--fold", type=int, help="one fold (default: all)")
    group.add_argument("--folds", type=_numbers, help="several folds, e.g. 0,2")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    group.add_argument("--seed", type=int, help="seed of all random numbers (default: 2021)")
    group.add_argument("--gpu", type=int, help="index of the CUDA device")
    group.add_argument("--device", help="any PyTorch device, e.g. cpu")
    group.add_argument("--num_workers", type=int, help="threads that read tokens")
    group.add_argument("--checkpoint_seconds", type=float, default=60.0, help="least time between two checkpoints")
    group.add_argument("--no_report", action="store_true", help="write the tables, not the figures and report.html")
    group.add_argument("--model_path", help="run folder, fold folder or checkpoint")
    group.add_argument("--seeds", type=_numbers, help="repeat the run with these seeds, e.g. 0,1,2")
    group.add_argument("--runs", nargs="+", metavar="RUN", help="run folders to compare; the first is the reference")
    group.add_argument("--intersect", action="store_true", help="compare what the runs share instead of refusing")
    group.add_argument("--out", help="file or folder to write")
    group.add_argument("--test_name", help="external test set below <data_dir>/test")


def _add_method_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help=f"one of: {', '.join(MODELS)} (default: gene_dml)")
    group.add_argument("--model_size", choices=("base", "large"), help="large: UNI2-h features, D = 1536")
    group.add_argument("--encoder", help="frozen patch encoder (default: uni)")
    group.add_argument("--weights", help="file of the encoder's weights")
    group.add_argument("--k", type=int, help="clusters of the instance-group loss")
    group.add_argument("--use_kmeans", action="store_true", help="k-means (the paper); otherwise spectral clustering")
    group.add_argument("--lambda_cld", type=float, help="weight of the instance-group loss")
    group.add_argument("--cld_t", type=float, help="temperature of the instance-group loss")
    group.add_argument("--epochs", type=int, help="greatest number of epochs (default: 200)")
    group.add_argument("--batch_size", type=int, help="spots in a batch (default: of the configuration)")
    group.add_argument("--slides_per_batch", type=int, help="draw every batch from N slides (0: from all)")
    group.add_argument("--protocol", choices=("clean", "paper"), help="how epochs, genes and averages are chosen")
    group.add_argument("--fixed_epochs", type=int, help="train N epochs instead of choosing one")
    for name, text in (
        ("normalize_fused", "normalise the fused vector in the instance-group loss"),
        ("start_at_mean", "output biases start at the training mean"),
        ("no_instance_loss", "ablation: without the instance-level loss"),
        ("no_group_loss", "ablation: without the instance-group loss"),
        ("no_neighbor", "ablation: without the neighbor scale"),
        ("no_global", "ablation: without the global scale"),
    ):
        group.add_argument(f"--{name}", action="store_true", help=text)


def _add_predict_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image", help="the slide: any plain image or whole-slide format")
    group.add_argument("--spots", help="positions: csv or tsv with x, y in pixels, or those of Space Ranger")
    group.add_argument("--exchanged_pixels", action="store_true", help="--spots is of a published external set")
    group.add_argument("--pitch_px", type=float, help="without --spots: grid on the tissue, spots this many px apart")
    group.add_argument("--pitch_um", type=float, help="the same in micrometres")
    group.add_argument("--mpp", type=float, help="micrometres per pixel (default: of the slide's metadata)")
    group.add_argument("--match_mpp", action="store_true", help="scale patches to the field of view of the training")
    group.add_argument("--min_tissue", type=float, help="share of a patch that must be tissue (default: 0.5)")
    group.add_argument("--genes", type=_names, help="also draw maps of these genes, e.g. ERBB2,GNAS")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,2, found {text!r}") from error


def check_flags(arguments: argparse.Namespace) -> None:
    """Flags that the mode would ignore, or that contradict each other, are errors; all in one message."""
    mode, problems = arguments.mode, []
    parser = build_parser()
    for flag, modes in MODES_OF_FLAG.items():
        if mode not in modes and getattr(arguments, flag) != parser.get_default(flag):
            instead = f"; --mode {mode} {INSTEAD[flag, mode]}" if (flag, mode) in INSTEAD else ""
            problems.append(f"--{flag} is for --mode {_or(modes)}{instead}.")
    if arguments.no_group_loss and arguments.lambda_cld is not None:
        problems.append(f"--no_group_loss leaves the loss out that --lambda_cld {arguments.lambda_cld:g} weighs.")
    if arguments.model_size == "large" and arguments.encoder not in (None, "uni2-h"):
        problems.append(f"--model_size large means --encoder uni2-h, but --encoder {arguments.encoder} is given.")
    if arguments.seed is not None and arguments.seeds is not None:
        problems.append("--seed and --seeds are both given; give one of them.")
    if problems:
        raise ValueError("\n".join(problems))


def _or(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The command line as SECTION.key=value; --set comes last and wins."""
    found = list(LARGE) if arguments.model_size == "large" else []
    for flag, key in KEY_OF_FLAG.items():
        value = getattr(arguments, flag)
        if value is not None:
            found.append(f"{key}={value}")
    found += [override for flag, override in SWITCHES.items() if getattr(arguments, flag)]
    return found + arguments.set


def config_of(arguments: argparse.Namespace) -> Config:
    """The configuration a mode asks for; --config_name is required."""
    if arguments.config_name is None:
        raise ValueError(f"--mode {arguments.mode} needs --config_name, for example --config_name her2st/dml.")
    config = load_config(arguments.config_name, overrides_of(arguments))
    find_model(config.MODEL.name)  # a wrong name is told before anything is read
    return config


def required(arguments: argparse.Namespace, name: str) -> str:
    """The value of a flag that the mode cannot do without."""
    value = getattr(arguments, name)
    if value is None:
        raise ValueError(f"--mode {arguments.mode} needs --{name}.")
    return value


def run_train(arguments: argparse.Namespace) -> None:
    from modes.train import TrainOptions, train, train_seeds
    from modes.training.compose import groups_spots

    config = config_of(arguments)
    if groups_spots(config) and not config.LOSS.use_kmeans:
        say("Instance groups come from spectral clustering; --use_kmeans selects the paper's k-means.")
    options = TrainOptions(
        config_name=config_label(arguments.config_name),
        config_file=arguments.config_name,
        run_name=arguments.run_name or f"exp_{config.GENERAL.exp_id}",
        device=device_from(arguments.gpu, arguments.device),
        folds=arguments.folds if arguments.fold is None else [arguments.fold, *(arguments.folds or [])],
        resume=arguments.resume,
        checkpoint_seconds=arguments.checkpoint_seconds,
        with_report=not arguments.no_report,
    )
    if arguments.seeds is None:
        train(config, options)
    else:
        train_seeds(config, options, arguments.seeds)


def run_test(arguments: argparse.Namespace) -> None:
    from modes.test import test

    device = device_from(arguments.gpu, arguments.device)
    data_type = load_config(arguments.config_name).DATA.type if arguments.config_name else None
    model_path, with_report = required(arguments, "model_path"), not arguments.no_report
    test(model_path, arguments.fold, overrides_of(arguments), device, data_type, with_report)


def run_compare(arguments: argparse.Namespace) -> None:
    from modes.compare import compare

    compare(required(arguments, "runs"), arguments.out, arguments.intersect)


def run_import_reference(arguments: argparse.Namespace) -> None:
    from modes.import_reference import Source, convert

    source = Source(required(arguments, "model_path"), required(arguments, "config_name"), required(arguments, "fold"))
    convert(config_of(arguments), source, required(arguments, "out"))


def run_external_test(arguments: argparse.Namespace) -> None:
    from modes.external_test import external_test

    test_name, model_path = required(arguments, "test_name"), required(arguments, "model_path")
    device = device_from(arguments.gpu, arguments.device)
    external_test(model_path, test_name, arguments.fold, overrides_of(arguments), device)


def run_predict(arguments: argparse.Namespace) -> None:
    from modes.predict import PredictOptions, predict

    options = PredictOptions(
        image=required(arguments, "image"),
        out=required(arguments, "out"),
        spots=arguments.spots,
        exchanged_pixels=arguments.exchanged_pixels,
        pitch_px=arguments.pitch_px,
        pitch_um=arguments.pitch_um,
        mpp=arguments.mpp,
        match_mpp=arguments.match_mpp,
        min_tissue=arguments.min_tissue,
        genes=tuple(arguments.genes or ()),
    )
    model_path, device = required(arguments, "model_path"), device_from(arguments.gpu, arguments.device)
    predict(model_path, options, arguments.fold, overrides_of(arguments), device)


def run_doctor(arguments: argparse.Namespace) -> None:
    from modes.doctor import Question, doctor

    config = config_of(arguments)
    run_name = arguments.run_name or f"exp_{config.GENERAL.exp_id}"
    question = Question(
        config_name=arguments.config_name,
        run_dir=Path(config.GENERAL.log_path) / config_label(arguments.config_name) / run_name,
        resume=arguments.resume,
        gpu=arguments.gpu,
        device=arguments.device,
        fold=arguments.fold,
        model_path=arguments.model_path,
        test_name=arguments.test_name,
    )
    doctor(config, question)


RUN_OF_MODE = {
    "train": run_train,
    "test": run_test,
    "external_test": run_external_test,
    "predict": run_predict,
    "compare": run_compare,
    "import_reference": run_import_reference,
    "doctor": run_doctor,
}


def main() -> None:
    arguments = build_parser().parse_args()
    check_flags(arguments)
    RUN_OF_MODE[arguments.mode](arguments)


if __name__ == "__main__":
    run(main)
