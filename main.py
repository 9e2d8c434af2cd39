"""Gene-DML: spatial gene expression from H&E images.

python main.py --config_name her2st/dml --mode train --k 18 --use_kmeans
python main.py --config_name her2st/dml --mode test --fold 0 --model_path PATH
python main.py --mode external_test --test_name 10x_breast_ff1 --model_path PATH
python main.py --mode predict --image SLIDE --model_path PATH --out FILE.h5ad
python main.py --mode doctor --config_name her2st/dml
"""

from __future__ import annotations

import utils._interrupts  # noqa: F401  first: the rest takes a while

# isort: split
import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import going_on_by, run, say
from utils.config import LARGE, Config, config_label, load_config
from utils.files import safe_name
from utils.flags import CommandLine, Flag, parse_names, parse_numbers

if TYPE_CHECKING:  # a mode imports what is heavy when it is asked for
    import torch

    from modes.doctor import Question
    from modes.predict import PredictOptions
    from modes.train import TrainOptions

MODES = {
    "train": "cross-validation, or some folds of it, with a test of each",
    "test": "trained folds on their own test patients",
    "external_test": "a run on an external set",
    "predict": "a slide without counts",
    "compare": "runs beside each other",
    "doctor": "checks before a run",
    "import_reference": "a checkpoint of the published code becomes one of ours",
}
CONFIG = tuple(mode for mode in MODES if mode != "compare")
OF_TRAINED = ("test", "external_test", "predict")
ON_DEVICE = ("train", *OF_TRAINED, "doctor")
START = ("train", "doctor")
PREDICT = ("predict",)
IN_CHECKPOINT = dict.fromkeys(("external_test", "predict"), "finds the configuration in the checkpoint")
FOLDS_OF_RUN = dict.fromkeys(("external_test", "predict"), "takes --fold N or all folds of the run")


def models() -> str:
    """Return the help of --model; it takes PyTorch."""
    from models.table import MODELS

    return f"one of: {', '.join(MODELS)} (default: gene_dml)"


# fmt: off
RUN = (
    Flag("config_name", (*START, "test", "import_reference"), "configuration below config/, e.g. her2st/dml, or a YAML file",
         needed_by=(*START, "import_reference"), also="config",
         instead={**IN_CHECKPOINT, "compare": "finds the configurations in the runs"}),
    Flag("set", CONFIG, "any configuration key", is_repeated=True, metavar="SECTION.key=value"),
    Flag("data_dir", CONFIG, "folder of the data sets", "DATA.data_dir"),
    Flag("log_path", START, "folder of the runs", "GENERAL.log_path"),
    Flag("run_name", START, "name of the run folder (default: exp_<exp_id>, with --all_patients exp_<exp_id>_all_patients)"),
    Flag("exp_id", START, "number of the run (default: 0)", "GENERAL.exp_id", int),
    Flag("fold", CONFIG, "one fold (default: all)", kind=int, needed_by=("import_reference",)),
    Flag("folds", ("train",), "several folds, e.g. 0,2", kind=parse_numbers,
         instead={"test": "takes --fold N or tests all folds", "doctor": "takes --fold N or checks all folds",
                  "import_reference": "takes --fold N", **FOLDS_OF_RUN}),
    Flag("all_patients", ("train",), "one model on every patient, in place of the folds; it has no score", kind=bool),
    Flag("epochs_from", ("train",), "with --all_patients: the cross-validation whose epochs and scores it takes over",
         metavar="RUN"),
    Flag("resume", START, "go on with an interrupted run", kind=bool),
    Flag("seed", CONFIG, "seed of all random numbers (default: 2021)", "GENERAL.seed", int),
    Flag("seeds", ("train",), "repeat the run with these seeds, e.g. 0,1,2", kind=parse_numbers,
         instead={"doctor": "takes one --seed"}),
    Flag("parallel", ("train",), "several processes: each takes free folds, or all share each batch (torchrun)",
         choices=("folds", "data")),
    Flag("gpu", ON_DEVICE, "index of the CUDA device", kind=int),
    Flag("device", ON_DEVICE, "any PyTorch device, e.g. cpu"),
    Flag("num_workers", CONFIG, "threads that read tokens", "DATA.num_workers", int),
    Flag("checkpoint_seconds", ("train",), "least time between two checkpoints (default: 60)", kind=float),
    Flag("wandb", ("train",), "the curves also for Weights & Biases; offline unless WANDB_MODE is set", kind=bool),
    Flag("no_report", ("train", "test", "external_test"), "write the tables, no figures and no pages", kind=bool),
    Flag("model_path", (*OF_TRAINED, "doctor", "import_reference"), "run folder, fold folder or checkpoint",
         nargs="+", metavar="RUN", needed_by=(*OF_TRAINED, "import_reference"),
         instead={"train": "goes on with a run by --resume", "compare": "takes --runs"}),
    Flag("runs", ("compare",), "run folders to compare; the first is the reference", nargs="+", metavar="RUN",
         needed_by=("compare",)),
    Flag("intersect", ("compare",), "compare what the runs share instead of refusing", kind=bool),
    Flag("out", ("predict", "compare", "import_reference"), "file or folder to write",
         needed_by=("predict", "import_reference"),
         instead={"train": "writes to --log_path and --run_name", "test": "writes beside the checkpoint",
                  "external_test": "writes below the run"}),
    Flag("overwrite", ("predict",), "replace the files of --out and --geojson if they are there", kind=bool),
    Flag("test_name", ("external_test", "doctor"), "external test set below <data_dir>/test",
         needed_by=("external_test",)),
)
METHOD = (
    Flag("model", CONFIG, models, "MODEL.name"),
    Flag("model_size", CONFIG, "large: UNI2-h features, D = 1536", choices=("base", "large"), presets={"large": LARGE}),
    Flag("encoder", CONFIG, "frozen patch encoder (default: uni)", "DATA.encoder"),
    Flag("weights", CONFIG, "file of the patch encoder's weights", "DATA.weights"),
    Flag("k", CONFIG, "clusters of the instance-group loss", "LOSS.k", int),
    Flag("use_kmeans", CONFIG, "k-means (the paper); otherwise spectral clustering", "LOSS.use_kmeans=true", bool),
    Flag("lambda_cld", CONFIG, "weight of the instance-group loss", "LOSS.group_weight", float),
    Flag("cld_t", CONFIG, "temperature of the instance-group loss", "LOSS.group_temperature", float),
    Flag("no_group_loss", CONFIG, "ablation: without the instance-group loss", "LOSS.group_weight=0", bool),
    Flag("epochs", CONFIG, "greatest number of epochs (default: 200)", "TRAINING.epochs", int),
    Flag("batch_size", CONFIG, "spots in a batch (default: of the configuration)", "TRAINING.batch_size", int),
    Flag("slides_per_batch", CONFIG, "draw every batch from N slides (0: from all)", "TRAINING.slides_per_batch", int),
    Flag("start_at_mean", CONFIG, "output biases start at the training mean", "TRAINING.start_at_mean=true", bool),
    Flag("protocol", CONFIG, "how epochs, genes and averages are chosen", "EVALUATION.protocol",
         choices=("clean", "paper")),
    Flag("fixed_epochs", CONFIG, "train N epochs instead of choosing one", "EVALUATION.fixed_epochs", int),
)
PREDICTION = (
    Flag("image", PREDICT, "the slide: any plain image or whole-slide format", needed_by=PREDICT),
    Flag("spots", PREDICT, "positions: csv or tsv with x, y in pixels, or those of Space Ranger"),
    Flag("exchanged_pixels", PREDICT, "--spots is of a published external set", kind=bool),
    Flag("pitch_px", PREDICT, "without --spots: grid on the tissue, spots this many px apart", kind=float),
    Flag("pitch_um", PREDICT, "the same in micrometres", kind=float),
    Flag("mpp", PREDICT, "micrometres per pixel (default: of the slide's metadata)", kind=float),
    Flag("match_mpp", (*PREDICT, "external_test"), "scale patches to the field of view of the training", kind=bool),
    Flag("region", PREDICT, "only spots in it: .geojson of areas (QuPath), or a mask image", metavar="FILE"),
    Flag("geojson", PREDICT, "also write the genes of --genes as QuPath detections", metavar="FILE"),
    Flag("min_tissue", PREDICT, "share of a patch that must be tissue (default: 0.5)", kind=float),
    Flag("genes", (*START, *OF_TRAINED), "train on these (DATA.genes); of a trained run: draw their maps; e.g. ERBB2,GNAS",
         kind=parse_names),
)
# fmt: on


def conflicts(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a message for every two flags that contradict each other."""
    if arguments.no_group_loss and arguments.lambda_cld is not None:
        yield f"--no_group_loss leaves the loss out that --lambda_cld {arguments.lambda_cld:g} weighs."
    if arguments.model_size == "large" and arguments.encoder not in (None, "uni2-h"):
        yield f"--model_size large means --encoder uni2-h, but --encoder {arguments.encoder} is given."
    if arguments.seed is not None and arguments.seeds is not None:
        yield "--seed and --seeds are both given; give one of them."
    if arguments.no_report and arguments.genes and arguments.mode in OF_TRAINED:
        yield "--genes draws genes in the report, which --no_report leaves out."
    if len(arguments.model_path or ()) > 1 and arguments.mode not in ("test", "predict"):
        yield f"--model_path: --mode {arguments.mode} takes one run; test and predict average several."
    if arguments.epochs_from is not None and not arguments.all_patients:
        yield "--epochs_from is for --all_patients, which is not given."
    if arguments.all_patients and arguments.parallel == "folds":
        yield "--all_patients trains one model, so there are no folds to share; --parallel data shares its batches."
    if arguments.all_patients and (arguments.fold is not None or arguments.folds is not None):
        yield "--all_patients trains one model in place of the folds; --fold and --folds choose some of them."


COMMAND_LINE = CommandLine(
    program="main.py",
    about=__doc__,
    modes=MODES,
    groups={"run": RUN, "method (of a trained model: as it was trained)": METHOD, "slide": PREDICTION},
    conflicts=conflicts,
)


def main(words: Sequence[str] | None = None) -> None:
    """Run the mode that a command line asks for.

    words: of the command line, without the program's name; those of this process by default.
    Raises ValueError or FileNotFoundError for whatever the user can mend, with what is wrong and what to do.
    """
    arguments = COMMAND_LINE.parse(sys.argv[1:] if words is None else words)
    overrides = COMMAND_LINE.overrides(arguments)
    if arguments.mode == "train":
        from modes.train import train, train_seeds
        from utils.parallel.team import opened_team

        config = config_of(arguments)
        options = train_options(config, arguments)
        with going_on_by("repeat it with --resume"), opened_team(arguments.parallel, options.device) as team:
            options = replace(options, team=team)
            if arguments.seeds is None:
                train(config, options)
            else:
                train_seeds(config, options, arguments.seeds)
    elif arguments.mode == "test":
        from modes.test import test

        data_type = load_config(arguments.config_name).DATA.type if arguments.config_name else None
        with_report = not arguments.no_report
        genes = arguments.genes or ()
        test(arguments.model_path, arguments.fold, overrides, device_of(arguments), data_type, with_report, genes)
    elif arguments.mode == "external_test":
        from modes.external_test import external_test

        external_test(
            arguments.model_path[0],
            arguments.test_name,
            arguments.fold,
            overrides,
            device_of(arguments),
            arguments.match_mpp,
            with_report=not arguments.no_report,
            genes=arguments.genes or (),
        )
    elif arguments.mode == "predict":
        from modes.predict import predict

        predict(arguments.model_path, predict_options(arguments), arguments.fold, overrides, device_of(arguments))
    elif arguments.mode == "compare":
        from modes.compare import compare

        compare(arguments.runs, arguments.out, arguments.intersect)
    elif arguments.mode == "doctor":
        from modes.doctor import doctor

        config = config_of(arguments)
        doctor(config, question_of(config, arguments))
    elif arguments.mode == "import_reference":
        from modes.import_reference import Source, convert

        source = Source(arguments.model_path[0], arguments.config_name, arguments.fold)
        convert(config_of(arguments), source, arguments.out)


def config_of(arguments: argparse.Namespace) -> Config:
    """Return the configuration that the flags mean. Raises ValueError, also for a model that does not exist."""
    from models.table import find_model

    given = [f"DATA.genes={json.dumps(','.join(arguments.genes))}"] if arguments.genes else []
    config = load_config(arguments.config_name, [*given, *COMMAND_LINE.overrides(arguments)])
    find_model(config.MODEL.name)
    return config


def train_options(config: Config, arguments: argparse.Namespace) -> TrainOptions:
    """Return what a training is asked for beside its configuration."""
    from modes.train import TrainOptions
    from modes.training.compose import groups_spots

    if groups_spots(config) and not config.LOSS.use_kmeans:
        say("Instance groups come from spectral clustering; --use_kmeans selects the paper's k-means.")
    seconds = 60.0 if arguments.checkpoint_seconds is None else arguments.checkpoint_seconds
    if not 0 <= seconds < math.inf:
        raise ValueError(f"--checkpoint_seconds {seconds:g} is no time; give seconds, 0 or more.")
    return TrainOptions(
        config_name=config_label(arguments.config_name),
        config_file=arguments.config_name,
        run_name=run_name_of(config, arguments),
        device=device_of(arguments),
        folds=arguments.folds if arguments.fold is None else [arguments.fold, *(arguments.folds or [])],
        resume=arguments.resume,
        checkpoint_seconds=seconds,
        with_report=not arguments.no_report,
        with_wandb=arguments.wandb,
        all_patients=arguments.all_patients,
        epochs_from=arguments.epochs_from,
        shares_folds=arguments.parallel == "folds",
    )


def predict_options(arguments: argparse.Namespace) -> PredictOptions:
    """Return what a prediction is asked for."""
    from modes.predict import PredictOptions

    return PredictOptions(
        image=arguments.image,
        out=arguments.out,
        spots=arguments.spots,
        exchanged_pixels=arguments.exchanged_pixels,
        pitch_px=arguments.pitch_px,
        pitch_um=arguments.pitch_um,
        mpp=arguments.mpp,
        match_mpp=arguments.match_mpp,
        min_tissue=arguments.min_tissue,
        region=arguments.region,
        geojson=arguments.geojson,
        genes=tuple(arguments.genes or ()),
        overwrite=arguments.overwrite,
    )


def question_of(config: Config, arguments: argparse.Namespace) -> Question:
    """Return what the doctor is asked beside the configuration."""
    from modes.doctor import Question

    return Question(
        config_name=arguments.config_name,
        run_dir=Path(config.GENERAL.log_path) / config_label(arguments.config_name) / run_name_of(config, arguments),
        resume=arguments.resume,
        gpu=arguments.gpu,
        device=arguments.device,
        fold=arguments.fold,
        model_path=arguments.model_path[0] if arguments.model_path else None,
        test_name=arguments.test_name,
    )


def run_name_of(config: Config, arguments: argparse.Namespace) -> str:
    """Return the name of the run folder: a plain name, or of one of several seeds `NAME/seed_<s>`.

    Raises ValueError for any other, and where there is no folder for it.
    """
    if not config.GENERAL.log_path.strip():
        raise ValueError("GENERAL.log_path is empty: give the folder of the runs, e.g. --log_path logs.")
    default = f"exp_{config.GENERAL.exp_id}{'_all_patients' if arguments.all_patients else ''}"
    name = default if arguments.run_name is None else arguments.run_name
    safe_name(re.sub(r"/seed_\d+\Z", "", name), "--run_name")
    return name


def device_of(arguments: argparse.Namespace) -> torch.device:
    """Return the device that was asked for, or the one there is."""
    from utils.devices import device_from
    from utils.parallel.team import own_device

    return own_device(arguments.gpu, arguments.device) or device_from(arguments.gpu, arguments.device)


if __name__ == "__main__":
    run(main)
