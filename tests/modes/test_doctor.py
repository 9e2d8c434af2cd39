"""The doctor: a healthy set passes; every kind of trouble is one readable line with its remedy, and the exit status 2."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from datasets.features import neighbor_files
from datasets.features.cache import opened, write_cache
from datasets.known_sets import get_spec
from datasets.layout import Layout
from datasets.tables.slide_table import load_slide
from models.contract import ModelInputs
from models.losses import GeneDMLLoss
from models.patch_encoders.build import patch_encoder_spec
from modes.checks.findings import Findings
from modes.checks.machine import available_memory, check_memory
from modes.doctor import Question, doctor, examine
from modes.prediction.model import make_model
from modes.training.memory import Demand, activations, demand, tokens_of_spot
from tests.caches import edited
from tests.command_line import call_main
from utils.config import Config, load_config, read_config, with_overrides


@pytest.fixture
def data_dir(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run.data_dir, tmp_path / "data")


@pytest.fixture
def layout(data_dir) -> Layout:
    return Layout(data_dir, get_spec("demo", data_dir), patch_size=64, num_neighbors=3, encoder="efficientnet-lite0")


@pytest.fixture
def config(tiny_run, data_dir) -> Config:
    return load_config(tiny_run.config_name, [f"DATA.data_dir={data_dir}"])


@pytest.fixture
def ask(tiny_run, tmp_path):
    """ask(config, ...) -> the findings as text, one a line."""

    def examine_as_text(config: Config, **changes: object) -> str:
        question = Question(config_name=tiny_run.config_name, run_dir=tmp_path / "logs" / "run", device="cpu")
        return "\n".join(str(finding) for finding in examine(config, replace(question, **changes)).found)

    return examine_as_text


def has(text: str, level: str, topic: str, *patterns: str) -> None:
    """One finding of that level and topic holds all patterns."""
    blocks = re.split(r"\n(?=\S)", text)
    of_kind = [block for block in blocks if re.match(rf"{level} +{topic}\b", block)]
    assert any(all(re.search(pattern, block) for pattern in patterns) for block in of_kind), text


def test_a_healthy_set_passes(tiny_run, tmp_path):
    left = call_main(
        "--mode", "doctor", "--config_name", tiny_run.config_name, "--data_dir", tiny_run.data_dir, "--log_path", tmp_path,
        "--device", "cpu",
    )  # fmt: skip
    assert left.status == 0, left.said
    assert "problem" not in left.said and "Nothing would stop this run" in left.said
    has(left.said, "ok", "data", r"3 slides; patients \(slides\): A \(1\), B \(1\), C \(1\)")
    has(left.said, "ok", "tables", r"fit: \d+ spots on 3 slides")
    has(
        left.said,
        "ok",
        "features",
        r"target and neighbor features of efficientnet-lite0 for 3 slides \(weights [0-9a-f]{12}\)",
    )
    has(left.said, "ok", "tokens", "token caches of 3 slides, 1 of 8 views")
    has(left.said, "ok", "encoder", "not needed in training")
    has(left.said, "ok", "genes", r"\d+ genes are measured on every slide; each fold chooses 24")
    has(left.said, "ok", "folds", r"3 can be run: 0 \(A\), 1 \(B\), 2 \(C\)")
    has(left.said, "ok", "memory", "features", "model with Adam", "a training step")
    assert not any(tmp_path.iterdir()), "the doctor writes nothing"


def test_no_data_folder(tmp_path):
    left = call_main("--mode", "doctor", "--config_name", "her2st/dml", "--data_dir", tmp_path, "--device", "cpu")
    assert left.status == 2 and "would stop this run" in left.said
    said = rf"The folder of her2st, '{tmp_path}/her2st', does not exist"
    has(left.said, "problem", "data", said, r"prepare_her2st\.py --source RAW --data_dir")
    has(left.said, "problem", "encoder", "No weights for encoder 'uni'", "hf download MahmoodLab/UNI")


def test_slides_that_lack_something_and_folds_without_them(config, layout, ask):
    layout.spots_path("C1").unlink()
    text = ask(config)
    has(text, "warning", "data", "1 slides cannot be used.*: C1", "no spot table")
    has(text, "ok", "folds", "2 can be run")
    has(text, "warning", "folds", "one training patient", "--fixed_epochs")


def test_known_slides_and_spot_numbers_are_expected(config, layout, ask):
    spec = yaml.safe_load(layout.spec_path.read_text()) if layout.spec_path.exists() else {}
    spec |= {"slides": ["A1", "B1", "C1", "D1"], "expected_spots": [300, 400]}
    layout.spec_path.write_text(
        yaml.safe_dump({"patient_pattern": "^([A-Z])", "image_pattern": "{patient}/{slide}/*", **spec})
    )
    text = ask(config)
    has(text, "ok", "data", "3 of 4 slides")
    has(text, "warning", "data", "1 slides cannot be used.*: D1")
    has(text, "warning", "tables", r"outside the known 300 to 400: A1 \(\d+\)")


def test_counts_of_another_slide(config, layout, ask):
    path = layout.counts_path("B1")
    table = pd.read_parquet(path)
    table.index = [f"{500 + i}x1" for i in range(len(table))]
    table.to_parquet(path)
    has(ask(config), "problem", "tables", "Slide B1", "have no spot in common", "belong to different slides")


@pytest.mark.parametrize("suffix", [".parquet", ".tsv.gz", ".csv", ".h5ad"])
def test_counts_of_every_kind_are_read_by_their_ids_alone(config, layout, ask, suffix):
    path = layout.counts_path("B1")
    table = pd.read_parquet(path)
    path.unlink()
    new = layout.counts_dir / f"B1{suffix}"
    if suffix == ".parquet":
        table.to_parquet(new)
    elif suffix == ".h5ad":
        anndata.AnnData(table.astype(np.float32)).write_h5ad(new)
    else:
        table.to_csv(new, sep="," if suffix == ".csv" else "\t")
    assert "problem" not in ask(config)


def test_spots_that_do_not_lie_on_the_tissue(config, layout, ask):
    """The centres of A1 are those of an image of a fifth of the size, two spots of B1 are not selected."""
    before = ask(config)
    has(
        before,
        "ok",
        "spots",
        r"\d+ to 100 % of the spots of 3 slides on tissue \(\d+ spots on glass\)",
        "overlay_SLIDE.png",
    )
    assert "warning  spots" not in before and all(layout.overlay_path(slide).is_file() for slide in ("A1", "B1", "C1"))
    table = pd.read_csv(layout.spots_path("A1"), sep="\t")
    table[["pixel_x", "pixel_y"]] /= 5
    table.to_csv(layout.spots_path("A1"), sep="\t", index=False)
    shown = layout.overlay_path("A1").read_bytes()
    counted = list(load_slide(layout, "B1").obs_names[:2])
    table = pd.read_csv(layout.spots_path("B1"), sep="\t")
    table["selected"] = [int(f"{round(x)}x{round(y)}" not in counted) for x, y in zip(table["x"], table["y"])]
    table.to_csv(layout.spots_path("B1"), sep="\t", index=False)
    text = ask(config)
    has(
        text,
        "warning",
        "spots",
        r"A1: spots and image may not belong together: \d+ % of the",
        r"The picture: \S+/overlay_A1\.png",
    )
    assert text.count("warning  spots") == 1 and layout.overlay_path("A1").read_bytes() != shown
    has(text, "warning", "tables", r"2 spots with counts are marked selected = 0 .* left out: B1 \(2\)")


def test_pictures_are_not_needed(config, layout, ask):
    """Where they cannot be written, the doctor goes on without."""
    shutil.rmtree(layout.root / "overlays")
    (layout.root / "overlays").write_text("a file in the way")
    has(ask(config), "ok", "spots", "of the spots of 3 slides on tissue")


def test_caches_of_other_spots_encoders_and_none(config, layout, ask):
    layout.cache_path("target", "A1").unlink()
    layout.cache_path("token", "A1").unlink()
    spots = layout.spots_path("B1")
    pd.read_csv(spots, sep="\t").iloc[:-3].to_csv(spots, sep="\t", index=False)
    text = ask(config)
    has(
        text, "problem", "features", "1 of 3 slides have no target features: A1", r"--extract_mode target .*--slides A1"
    )
    has(text, "problem", "features", r"B1\.h5 cannot be used", r"\d extra", "eep it elsewhere", "--slides B1")
    has(text, "problem", "tokens", r"token_features_efficientnet-lite0_64/B1\.h5 cannot be used")
    has(text, "warning", "tokens", "1 of 3 slides have no token cache", "--extract_mode token")
    text = ask(with_overrides(config, ["DATA.encoder=resnet50"]))
    has(text, "problem", "features", "3 of 3 slides have no target features", "--encoder resnet50")
    has(text, "problem", "encoder", "No weights for encoder 'resnet50'")
    has(ask(with_overrides(config, ["DATA.encoder=unii"])), "problem", "encoder", "unii", "uni")


def test_published_features_with_a_wrong_number_of_rows(config, layout, ask):
    layout.cache_path("target", "A1").unlink()
    torch.save(torch.zeros(7, 112), layout.cache_path("target", "A1").with_suffix(".pt"))
    has(ask(config), "problem", "features", r"A1\.pt holds 7 rows but slide A1 has \d+ spots", "shorter table")


def test_a_patch_size_that_the_encoder_does_not_take(config, ask):
    has(
        ask(with_overrides(config, ["DATA.encoder=uni", "DATA.patch_size=100"])),
        "problem",
        "encoder",
        "multiples of 16 px",
    )


def test_genes_of_the_panel(config, layout, ask):
    has(ask(with_overrides(config, ["DATA.num_genes=900"])), "problem", "genes", "panel of 900", "DATA.num_genes=")
    paper = with_overrides(config, ["EVALUATION.protocol=paper"])
    has(ask(paper), "ok", "genes", "lists 24 genes")
    path = layout.counts_path("B1")
    table = pd.read_parquet(path)
    table.drop(columns=np.load(layout.panel_path)[:2]).to_parquet(path)
    has(
        ask(paper),
        "problem",
        "genes",
        r"2 of 24 genes of .*genes_demo\.npy .*\(on B1\)",
        "in a file of its own: .*select_genes.py --type demo --data_dir .* --out FILE.npy",
        r"select_genes\.py --type demo",
    )
    layout.panel_path.unlink()
    has(ask(paper), "problem", "genes", r"genes_demo\.npy does not exist", r"select_genes\.py")


def test_clusters_folds_and_run_folders(config, ask, tmp_path):
    has(ask(with_overrides(config, ["LOSS.k=400"])), "problem", "clusters", r"k = 400 clusters.*smallest batch", "--k")
    has(ask(config, fold=7), "problem", "folds", "fold 7 cannot be run; these can: 0", "--fold")
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / "config.yaml").write_text("GENERAL: {seed: 1}\n")
    has(ask(config), "problem", "run", "already holds an unfinished run", "--resume", "--run_name")


def test_a_finished_run_is_no_problem(config, ask, tiny_run, tmp_path):
    tiny_run.copy(tmp_path / "logs")
    summary = re.escape(str(tmp_path / "logs" / "run" / "summary.md"))
    said = ask(config, fold=0)
    has(
        said,
        "finished",
        "run",
        rf"already holds fold_0 of a run, finished: its summary is {summary}; .*--run_name NAME",
    )
    assert "problem" not in said
    has(ask(config), "problem", "run", "already holds an unfinished run")
    asked = Question(config_name=tiny_run.config_name, run_dir=tmp_path / "logs" / "run", device="cpu", fold=0)
    with pytest.raises(ValueError, match=r"This run is finished, so the same command trains nothing"):
        doctor(config, asked)
    again = ask(read_config(tiny_run.path / "config.yaml"), fold=0, resume=True)
    has(again, "ok", "run", rf"is finished, so --resume only makes its summary again: {summary}")


def test_a_device_that_is_not_there(config, ask):
    has(ask(config, device=None, gpu=77), "problem", "device", "--gpu 77", "--device cpu")
    has(ask(with_overrides(config, ["TRAINING.precision=fp16"])), "problem", "device", "fp16 needs a CUDA device")
    if not torch.cuda.is_available():
        has(ask(config, device=None), "warning", "device", "no CUDA device")


def test_what_a_token_cache_would_take(config, layout, ask):
    shutil.rmtree(layout.cache_path("token", "A1").parent)
    text = ask(config)
    spots = int(re.search(r"fit: (\d+) spots", text)[1])
    gigabytes = f"{spots * 8 * 16 * 112 * 2 / 1e9:.3g} GB"
    has(
        text, "warning", "tokens", rf"8 views would take {re.escape(gigabytes)}, .* GB are free", "--extract_mode token"
    )
    has(text, "ok", "encoder", r"efficientnet-lite0: .*\(it runs in every step\)")


def test_memory_is_counted_from_sizes_alone(monkeypatch):
    """UNI, HER2ST, batch 512: the parts that can be counted by hand; more than there is, is a problem."""
    large = with_overrides(load_config("her2st/dml"), [])
    need = demand(large, patch_encoder_spec("uni"), spots=13620, slide_sizes=[378] * 36, online=False, half=False)
    assert need.features == 13620 * 26 * 1024 * 4
    assert need.patches == need.encoder == 0
    layer = 1024 * 1024 * (3 + 1 + 8)
    assert need.model == pytest.approx((9 * layer) * 4 * 5, rel=0.1), "nine layers hold most of the parameters"
    assert 5e9 < need.batch < 40e9
    assert demand(large, patch_encoder_spec("uni"), 13620, [378] * 36, False, True).batch == need.batch / 2
    few = with_overrides(large, ["TRAINING.slides_per_batch=5"])
    assert demand(few, patch_encoder_spec("uni"), 13620, [378] * 36, False, False).batch < need.batch
    findings = Findings()
    check_memory(Demand(0, 0, 0, 0, batch=10**15), torch.device("cpu"), findings)
    has(str(findings.found[0]), "problem", "memory", r"1.3e\+06 GB of host memory are needed", "--batch_size")
    large = Demand(10**15, 0, 0, 0, batch=0, neighbors=10**15 - 1)
    for residence, kind in (("auto", "ok"), ("disk", "ok"), ("host", "problem")):
        check_memory(large, torch.device("cpu"), findings, residence)
        has(str(findings.found[-1]), kind, "memory", "in their files" if kind == "ok" else "are needed")
    near = Demand(need.features, 0, 0, 0, batch=0, neighbors=need.neighbors)
    for share in (1.0, 0.8):  # of the free memory; as the training decides, a tenth of it stays free
        free = round(near.features - near.neighbors + near.neighbors / share)
        monkeypatch.setattr(neighbor_files, "available_memory", lambda free=free: free)
        check_memory(near, torch.device("cpu"), findings)
        assert ("in their files" in str(findings.found[-1])) == (share == 1.0)
    assert 1e8 < available_memory() < 1e14


def test_what_stays_free_on_a_gpu_holds_the_step_and_the_batches_under_way():
    """Backward temporaries and five batches come on top of what autograd keeps; pooled tokens need less."""
    config, uni = load_config("her2st/dml"), patch_encoder_spec("uni")
    need = demand(config, uni, 13620, [378] * 36, online=False, half=True)
    batch_of_tokens = config.TRAINING.batch_size * (197 * 1024 * 2 + 25 * 1024 * 4)
    assert need.inputs == batch_of_tokens
    assert need.on_device == round(need.model + 1.3 * need.batch + 5 * batch_of_tokens)
    pooled = demand(config, uni, 13620, [378] * 36, online=False, half=True, num_tokens=50)
    assert pooled.on_device < need.on_device
    online = demand(config, uni, 13620, [378] * 36, online=True, half=True)
    assert online.inputs == config.TRAINING.batch_size * (224 * 224 * 3 + 25 * 1024 * 4)


def test_tokens_of_a_spot_are_those_of_the_cache(layout):
    spec = patch_encoder_spec("efficientnet-lite0")
    assert tokens_of_spot(layout, ["no such slide"], spec) == spec.num_tokens(64) == 16
    slide = layout.slides_on_disk()[0]
    path = layout.cache_path("token", slide)
    with opened(path) as cache:
        identity, ids, centers, tokens = (
            replace(cache.identity, token_pool=2),
            cache.spot_ids,
            cache.centers,
            cache.read(),
        )
    write_cache(path, identity, ids, centers, [tokens[:, :, :4]])
    assert tokens_of_spot(layout, [slide], spec) == 4


@pytest.mark.parametrize(("batch", "slide_sizes"), [(32, [100, 80]), (16, [300, 200])])
def test_the_estimate_of_a_step_is_what_autograd_keeps(batch, slide_sizes):
    settings = ["projection_dim=192", "fusion_mlp_dim=384", "neighbor_depth=2", "global_depth=2"]
    config = with_overrides(load_config("her2st/dml"), [f"MODEL.{key}" for key in settings])
    config = with_overrides(config, ["LOSS.k=4", "LOSS.use_kmeans=true", f"TRAINING.batch_size={batch}"])
    spec, rows, tokens = patch_encoder_spec("kaiko-vits16"), sum(slide_sizes), 30
    model = make_model(config, feature_dim=spec.dim, token_dim=spec.dim, num_genes=50).train()
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    cells = torch.arange(max(slide_sizes))
    grid = torch.cat([torch.stack([cells % 20, cells // 20], dim=1)[:size] for size in slide_sizes])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        context = model.encode_slides(torch.randn(rows, spec.dim), grid, slide_sizes, torch.arange(batch))
        inputs = ModelInputs(
            target_tokens=torch.randn(batch, tokens, spec.dim),
            target_features=torch.randn(batch, spec.dim),
            neighbor_features=torch.randn(batch, 25, spec.dim),
            neighbor_is_valid=torch.ones(batch, 25, dtype=torch.bool),
            global_tokens=context,
        )
        prediction = model(inputs, torch.rand(batch, 50))
        loss = GeneDMLLoss(config.LOSS)(prediction, torch.rand(batch, 50))["total"]
    assert loss.isfinite()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = sum(nbytes for pointer, (nbytes, _) in kept.items() if pointer not in parameters)
    assert activations(config, spec, tokens, slide_sizes) * 4 == pytest.approx(found, rel=0.25)


def renamed(data_dir: Path, source: str, target: str, slides: dict[str, str]) -> Layout:
    """Counts and spot tables of the tiny set under the names of another; enough to be recognised as prepared."""
    new = Layout(data_dir, get_spec(target, data_dir), patch_size=64, num_neighbors=3, encoder="efficientnet-lite0")
    old = Layout(data_dir, get_spec(source, data_dir), patch_size=64, num_neighbors=3, encoder="efficientnet-lite0")
    for here, there in slides.items():
        for path, copy in (
            (old.counts_path(here), new.new_counts_path(there)),
            (old.spots_path(here), new.spots_path(there)),
            *((old.cache_path(k, here), new.cache_path(k, there)) for k in ("target", "neighbor", "token")),
        ):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return new


def test_tissue_that_two_sets_share(config, data_dir, ask):
    renamed(data_dir, "demo", "her2st", {"A1": "A1", "B1": "E1", "C1": "H2"})
    renamed(data_dir, "demo", "stnet", {"A1": "BC23567_D2", "B1": "BC24044_E1", "C1": "BC23209_C1"})
    text = ask(with_overrides(config, ["DATA.type=her2st"]))
    has(
        text,
        "warning",
        "tissue",
        "her2st and stnet hold the same tissue: E = BC23567, H = BC24044",
        "--mode external_test",
    )
    text = ask(with_overrides(config, ["DATA.type=stnet"]))
    has(text, "warning", "tissue", "stnet and her2st hold the same tissue: BC23567 = E, BC24044 = H")
    assert "same tissue" not in ask(config)


def test_a_run_that_has_seen_the_tissue(config, data_dir, tiny_run, tmp_path, ask):
    """A checkpoint of her2st, asked about stnet."""
    renamed(data_dir, "demo", "stnet", {"A1": "BC23567_D2", "B1": "BC23209_C1", "C1": "BC23810_D2"})
    run = tiny_run.copy(tmp_path)
    for path in run.glob("fold_*/best.pt"):
        content = torch.load(path, weights_only=True)
        content["config"]["DATA"]["type"] = "her2st"
        content["fold"] |= {"train_patients": ["E"], "validation_patients": ["G"], "test_patients": ["F"]}
        torch.save(content, path)
    text = ask(with_overrides(config, ["DATA.type=stnet"]), model_path=str(run))
    has(text, "ok", "model", r"2 fold\(s\) of .*gene_dml trained on her2st, 24 genes, features of efficientnet-lite0")
    has(text, "warning", "tissue", "1 of 3 slides show tissue that the run has been trained on", "BC23567.*her2st E")


def test_a_run_of_other_features_or_another_field_of_view(config, tiny_run, tmp_path, ask):
    run = tiny_run.copy(tmp_path)
    has(ask(config, model_path=str(run)), "ok", "view", r"A patch is 102 um wide on demo and was 102 um")
    path = run / "fold_0" / "best.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "field_of_view_um": 50.0}, path)
    has(ask(config, model_path=str(run)), "warning", "view", "a factor of 2.05: cells look smaller", "--match_mpp")
    text = ask(with_overrides(config, ["DATA.encoder=resnet50"]), model_path=str(run))
    has(
        text,
        "problem",
        "model",
        "encoder resnet50 here, efficientnet-lite0 in training",
        "--encoder efficientnet-lite0",
    )
    has(ask(config, model_path=str(tmp_path / "no_run")), "problem", "model", "does not exist; give a run folder")


def test_fields_of_view_that_differ_within_a_set(config, data_dir, ask):
    """her2st: A was scanned at about 0.93 um/px, the others at 0.68."""
    renamed(data_dir, "demo", "her2st", {"A1": "A1", "B1": "B1", "C1": "C1"})
    for path in (data_dir / "her2st").rglob("*.h5"):
        with edited(path) as file:
            file.attrs["microns_per_pixel"] = np.nan
    text = ask(with_overrides(config, ["DATA.type=her2st"]))
    has(text, "warning", "view", r"patches are 44 um \(B1\) to 60 um \(A1\) wide", "cells look smaller on A1")
    has(ask(config), "ok", "view", r"patches are 102 um \(A1\) to 102 um")


def test_an_external_set(config, tiny_run, ask):
    external = ask(config, test_name="demo_external", model_path=str(tiny_run.path))
    has(external, "ok", "data", r"demo_external in .*test/demo_external: 1 slides")
    has(
        external,
        "problem",
        "features",
        "1 of 1 slides have no target features",
        "--mode external --test_name demo_external",
    )


def test_findings_of_a_kind_are_not_a_flood():
    findings = Findings()
    findings.problems("tables", [f"slide {i}" for i in range(40)])
    assert len(findings.found) == 7 and "34 more" in findings.found[-1].text
    assert str(findings.found[0]) == "problem  tables    slide 0"
