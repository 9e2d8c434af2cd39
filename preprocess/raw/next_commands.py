"""What comes after a set of one's own is prepared, as commands to copy."""

from __future__ import annotations

from datasets.known_sets import SPECS
from datasets.layout import Layout
from preprocess.raw.training_panel import TrainingPanel
from utils.cli import say
from utils.commands import extraction_command
from utils.config import Data, load_config
from utils.files import write_text


def say_next_of_training(layout: Layout, num_genes: int) -> None:
    """Write a configuration for the set, unless it has one, and say the commands that lead to a trained fold.

    num_genes: how many genes all sections have.
    """
    path = layout.root / f"{layout.name}.yaml"
    patients = sorted({layout.spec.patient_of(slide) for slide in layout.slides_with_counts()})
    if not path.is_file():
        write_text(
            path,
            "# What is not here has its default, of HER2ST (docs/commands.md). This file is yours to change.\n"
            f"DATA:\n  type: {layout.name}\n  data_dir: {layout.data_dir}\n"
            f"  num_genes: {min(Data.num_genes, num_genes)}\n",
        )
        say(f"{path}: a configuration of the set, to start from.")
    if len(patients) < 2:
        say(
            f"So far all sections are of patient {patients[0]}. Training takes two patients: prepare more into this set."
        )
        return
    for kind in ("target", "neighbor"):
        data = load_config(path).DATA
        command = extraction_command(
            kind,
            data_dir=layout.data_dir,
            test_name=None,
            patch_size=data.patch_size,
            num_neighbors=data.num_neighbors,
            config_name=str(path),
        )
        say(f"Next: {command}")
    say(f"Then: python main.py --mode doctor --config_name {path}")
    train = f"python main.py --config_name {path} --mode train --use_kmeans"
    if len(patients) == 2:
        say(
            "Two patients leave none to choose the number of epochs, so it is set beforehand; 50 is a number to start from "
            "(docs/first_run.md)."
        )
        train += " --fixed_epochs 50"
    say(f"Then: {train}")
    if load_config(path).EVALUATION.protocol == "paper" and not layout.panel_path.is_file():
        say(f"Before it, as the protocol is that of the paper: python preprocess/select_genes.py --config {path}")


def say_next_of_external(layout: Layout, panel: TrainingPanel) -> None:
    """Say the commands that lead to the test; for a run they make features as it was trained on."""
    run_path = "RUN" if panel.trained is None else panel.source
    for kind in ("target", "neighbor"):
        say(f"Next: {next_extraction(layout, panel, kind)}")
    say(
        f"Then: python main.py --mode external_test --test_name {layout.name} --model_path {run_path} "
        f"--data_dir {layout.data_dir}"
    )


def next_extraction(layout: Layout, panel: TrainingPanel, kind: str) -> str:
    """Spell the command that extracts features of this kind, as the run that is the panel's source was trained on.

    kind: "target" or "neighbor".
    """
    trained = panel.trained
    if trained is None or panel.config_name is None:
        config = "" if panel.type in SPECS else " --config CONFIG"
        return (
            f"python preprocess/extract_features_uni.py --mode external --extract_mode {kind} --test_name {layout.name} "
            f"--data_dir {layout.data_dir}{config}"
        )
    try:
        default = load_config(panel.config_name).DATA.encoder
    except (ValueError, FileNotFoundError):  # of a run made elsewhere
        default = None
    encoder = None if trained.encoder == default else trained.encoder
    return extraction_command(
        kind,
        encoder=encoder,
        data_dir=layout.data_dir,
        test_name=layout.name,
        patch_size=trained.patch_size,
        num_neighbors=trained.num_neighbors,
        config_name=panel.config_name,
    )
