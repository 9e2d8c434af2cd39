"""README.md and docs/: every command is parsed by its own program, the README's chain is run, tables agree with the code."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import pytest
import torch
import yaml

import main
from models.table import MODELS
from preprocess import extract_features_uni
from tests.command_line import call, call_main
from tests.shortcuts import keep_spots
from utils.config import SECTIONS, load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "weights" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_OURS = (
    "conda",
    "docker",
    "source",
    "pip",
    "hf",
    "tensorboard",
    "python3.11",
    "git",
    "tar",
    "unzip",
    "mkdir",
    "cp",
    "for",
)  # programs that pages may show beside ours
PROGRAMS = [path for path in sorted((ROOT / "preprocess").glob("*.py")) if "__main__" in path.read_text()]
OWN_TEST = {
    "your_data.md": "tests/modes/test_own_dataset.py",
    "first_run.md": "tests/modes/test_first_run.py",
}  # configurations that a page makes itself
TABLES = {
    "main.py": main.COMMAND_LINE,
    "preprocess/extract_features_uni.py": extract_features_uni.COMMAND_LINE,
}  # the programs that have modes; the others have a parser each
TINY = """
GENERAL: {{log_path: {logs}}}
DATA: {{type: demo, data_dir: {data}, patch_size: 64, num_neighbors: 3, num_genes: 24, encoder: efficientnet-lite0}}
MODEL:
  {{projection_dim: 32, neighbor_depth: 1, neighbor_mlp_ratio: 1, global_depth: 2, global_heads: 4, global_mlp_ratio: 1,
   fusion_mlp_dim: 32, gene_mlp_dim: 32, predictor_dim: 32}}
LOSS: {{k: 4}}
TRAINING: {{batch_size: 64, epochs: 1, learning_rate: 1.0e-3}}
"""


@dataclass(frozen=True)
class Command:
    """One line of a code block of a page, without variables set before it."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.line, comments=True)
        while words and re.fullmatch(r"[A-Z0-9_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0] == "torchrun":  # its own flags come before our program
            words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
        if words and words[0] == "sbatch":
            script = next(i for i, word in enumerate(words) if word.endswith(".sh"))
            (line,) = re.findall(r"^srun .*", (ROOT / words[script]).read_text(), flags=re.MULTILINE)
            ours = shlex.split(line)
            words = ["python", *ours[2 : ours.index("$@")], *words[script + 1 :]]
        return words

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def commands_of(page: Path) -> list[Command]:
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [Command(page.name, line) for line in lines]


COMMANDS = [
    command for page in PAGES for command in commands_of(page) if command.words
]  # a line may set variables alone
SCRIPTS = [command for command in COMMANDS if command.words[0] == "python" and command.words[1] != "-m"]


class Parsed(Exception):
    """A program has parsed its command line; what it would do next is not done."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace):
        super().__init__()
        self.parser, self.arguments = parser, arguments


@pytest.fixture
def parse(monkeypatch) -> Callable[[str, list[str]], Parsed]:
    """parse(script, arguments): what the program's own parser makes of a command line; SystemExit where it refuses."""
    original = argparse.ArgumentParser.parse_args

    def stop_after(self, *given, **named):
        raise Parsed(self, original(self, *given, **named))

    def parse_with(script: str, arguments: list[str]) -> Parsed:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
        with pytest.raises(Parsed) as caught:
            module.main()
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", original)
        return caught.value

    return parse_with


def parser_of(script: str, parse) -> argparse.ArgumentParser:
    """The parser of a script, with a command line that holds whatever it requires."""
    needed = {
        "preprocess/prepare_visium.py": ["--source", "a", "--image", "b", "--name", "c"],
        "preprocess/prepare_anndata.py": ["--source", "a", "--image", "b", "--name", "c"],
        "preprocess/import_features.py": ["--source", "a", "--format", "clam", "--config", "demo/dml"],
        "preprocess/select_genes.py": ["--type", "demo"],
        "preprocess/select_spots.py": ["--type", "demo", "--slide", "a", "--region", "b"],
        "preprocess/simulate_demo.py": [],
    }
    return parse(script, needed.get(script, ["--source", "a"])).parser


def flags_of(script: str, parse) -> dict[str, str | None]:
    """--flag -> its help."""
    if script in TABLES:
        return {
            "--mode": "in the help of every mode",
            **{f"--{flag.name}": flag.describe() for flag in TABLES[script].flags},
        }
    actions = parser_of(script, parse)._actions
    return {text: action.help for action in actions for text in action.option_strings if text not in ("-h", "--help")}


# -- commands ---------------------------------------------------------------------------------------------------------


def test_pages_show_commands():
    assert len(SCRIPTS) > 40 and {command.page for command in SCRIPTS} > {"README.md", "training.md", "predict.md"}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_is_one_of_ours(command):
    program = command.words[0]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        known = set(re.findall(r"^([a-z]+):|^([A-Z_]+) :=", makefile, flags=re.MULTILINE))
        rules = {name for pair in known for name in pair if name}
        assert {word.partition("=")[0] for word in command.words[1:]} <= rules, f"Makefile has {sorted(rules)}"
    elif command.words[:2] == ["python", "-m"]:
        assert command.line.replace("python", "$(PYTHON)") in (ROOT / "Makefile").read_text()
    elif program == "python":
        assert (ROOT / command.words[1]).is_file()
    else:
        assert program in NOT_OURS


@pytest.mark.parametrize("command", SCRIPTS, ids=str)
def test_command_is_understood_by_its_program(command, parse, tmp_path, monkeypatch):
    """Flags exist and are of the mode, values and configuration keys are valid, and what the mode requires is given."""
    script, arguments = command.words[1], command.words[2:]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as left:
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(arguments)
        assert not left.value.code
        return
    if script.startswith("docs/"):
        assert set(re.findall(r"--\w+", command.line)) <= set(re.findall(r'"(--\w+)"', (ROOT / script).read_text()))
        return
    if script not in TABLES:
        parse(script, arguments)
        return
    found = TABLES[script].parse(arguments)
    if script == "main.py" and found.config_name and command.page not in OWN_TEST:
        load_config(found.config_name, main.COMMAND_LINE.overrides(found))
    if script == "preprocess/extract_features_uni.py" and found.mode == "internal" and command.page not in OWN_TEST:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        extract_features_uni.resolve(found)


def test_commands_of_the_published_data_sets_are_in_the_readme():
    shown = [command.line for command in commands_of(ROOT / "README.md")]
    for line in (
        "python preprocess/extract_features_uni.py --config her2st/dml --mode internal --extract_mode target",
        "python preprocess/extract_features_uni.py --config her2st/dml --mode internal --extract_mode neighbor",
        "python preprocess/extract_features_uni.py --mode external --extract_mode target --test_name 10x_breast_ff1",
        "python main.py --config_name her2st/dml --mode train --k 18 --use_kmeans --model_size base",
        "python main.py --config_name skinst/dml --mode train --k 25 --use_kmeans --model_size base",
        "python main.py --config_name stnet/dml --mode train --k 90 --use_kmeans --model_size base",
    ):
        assert line in shown
    assert shown[:2] == ["make demo", "make test"]


def test_the_page_of_the_demo_shows_the_commands_of_make_demo():
    rule = re.search(r"^demo: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    lines = [line.strip() for line in rule.replace("$(PYTHON)", "python").replace("$(DEMO)", "demo").splitlines()]
    shown = [command.line for command in commands_of(ROOT / "docs" / "first_run.md")]
    shown = shown[shown.index("make demo") :]
    assert shown[1 : len(lines)] == [line for line in lines if line.startswith("python")]


# -- the chain of the README, on a tiny set ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """What the README's commands have left: the folder they ran in, and the modes that ran."""

    folder: Path
    modes: set[str]

    @property
    def run(self) -> Path:
        return self.folder / "logs" / "tiny" / "exp_0"


@pytest.fixture(scope="module")
def chain(tiny_data, tmp_path_factory, _takes_shortcuts) -> Chain:
    """The commands of the README, one after the other, as written but small: three patients with one slide each.

    Left out are those for data that are not here: the preparing scripts and the other data sets have their own tests.
    """
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("readme")
    data = Path(shutil.copytree(tiny_data, folder / "data", ignore=shutil.ignore_patterns("?2*", "D*")))
    for root in (data / "demo", data / "test" / "demo_external"):
        keep_spots(root)
    config = folder / "tiny.yaml"
    config.write_text(TINY.format(data=data, logs=folder / "logs"))
    here = {
        "--config her2st/dml": f"--config {config}",
        "--config_name her2st/dml": f"--config_name {config}",
        "--mode external ": f"--mode external --config {config} ",
        "--extract_mode token": "--extract_mode token --views 1",
        "10x_breast_ff1": "demo_external",
        "logs/her2st/dml": str(folder / "logs" / "tiny"),
        "slide.svs": str(data / "test" / "demo_external" / "ST-imgs" / "X" / "X1" / "X1.jpg"),
        "slide.h5ad": str(folder / "slide.h5ad"),
        "--pitch_um 100": "--pitch_px 128",  # the demo's picture does not say how large a pixel is
        "ERBB2,GNAS": "COL1A1,CD74",
        "--k 18": "--k 4",
        "--model_size base": "",
    }
    result = Chain(folder, set())
    for command in commands_of(ROOT / "README.md"):
        line = command.line
        if not line.startswith("python") or "prepare_" in line or "skinst" in line or "stnet" in line:
            continue
        for word, replacement in here.items():
            line = line.replace(word, replacement)
        result.modes.add(run_line(line, result.run))
    return result


def run_line(line: str, run: Path) -> str:
    """Run one command of the chain; returns its mode."""
    programs = {"main.py": main.main, "preprocess/extract_features_uni.py": extract_features_uni.main}
    words = shlex.split(line)
    mode = words[words.index("--mode") + 1]
    if mode != "compare":
        words += ["--device", "cpu"]
    if mode == "doctor":
        words += ["--run_name", "next"]  # the folder of the first run is taken
    if "--resume" in words:
        shutil.rmtree(run / "fold_2")  # as if the training had ended there
    if mode in ("train", "test", "external_test"):
        words.append("--no_report")  # its pictures take longer than all else here; evaluation/ has its tests
    left = call(programs[words[1]], *words[2:])
    assert left.status == 0, f"{line}\n{left.said}"
    return mode


def test_the_commands_of_the_readme_run_one_after_the_other(chain):
    assert chain.modes == {"internal", "external", "train", "test", "external_test", "predict", "compare", "doctor"}
    assert {path.name for path in chain.run.glob("fold_*")} == {"fold_0", "fold_1", "fold_2"}
    assert (chain.run / "external" / "demo_external" / "summary.md").is_file()
    assert "COL1A1" in anndata.read_h5ad(chain.folder / "slide.h5ad").var_names
    assert (chain.folder / "slide_COL1A1.png").is_file()
    assert "no_group_loss" in (chain.run.parent / "comparison" / "comparison.md").read_text()


def test_files_of_a_run_are_the_ones_listed(chain):
    page = (ROOT / "docs" / "commands.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE)
    listed = {name.strip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    found = {path.name for path in chain.run.iterdir() if not path.name.startswith("fold_")} - {"external"}
    found |= {path.name for path in (chain.run / "fold_2").iterdir()} - {"predictions"}
    assert {"summary.json", "best.pt", "result.json"} < found
    assert (found | {"report.html", "figures"}) - listed == set()
    adata = anndata.read_h5ad(chain.run / "fold_1" / "predictions" / "B1.h5ad")
    names = {f'["{name}"]' for name in (*adata.layers, *adata.obsm, *adata.obs, *adata.uns) if name}
    assert {name for name in names if name not in page} == set()


# -- tables -----------------------------------------------------------------------------------------------------------


def section(page: str, heading: str) -> str:
    """The text of a section of second level."""
    text = (ROOT / "docs" / page).read_text()
    match = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert match, f"{page} has no section {heading}"
    return match[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def needs_of_modes() -> dict[str, list[str]]:
    """mode -> what docs/commands.md says that it needs."""
    table = [row for row in rows(section("commands.md", "main.py")) if row[0].strip("`") in main.MODES]
    return {row[0].strip("`"): re.findall(r"--(\w+)", row[2]) for row in table}


def test_every_mode_is_documented_with_what_it_needs():
    needs = needs_of_modes()
    flags = list(main.COMMAND_LINE.flags)
    assert {mode: sorted(names) for mode, names in needs.items()} == {
        mode: sorted(flag.name for flag in flags if mode in flag.needed_by) for mode in main.MODES
    }
    for mode, names in needs.items():
        for absent in names:
            values = {"runs": ["a", "b"], "fold": ["0"], "config_name": ["demo/dml"], "model_path": ["nowhere"]}
            given = [word for name in names if name != absent for word in (f"--{name}", *values.get(name, ["x"]))]
            left = call_main("--mode", mode, *given)
            assert left.status == 2 and f"--{absent}" in left.said, (mode, absent, left.said)


@pytest.mark.parametrize(
    ("heading", "scripts"),
    [
        ("main.py", ["main.py"]),
        ("preprocess/extract_features_uni.py", ["preprocess/extract_features_uni.py"]),
        ("preprocess/prepare_*.py", [f"preprocess/{path.name}" for path in (ROOT / "preprocess").glob("prepare_*.py")]),
        ("preprocess/import_features.py", ["preprocess/import_features.py"]),
        ("preprocess/select_genes.py", ["preprocess/select_genes.py"]),
        ("preprocess/simulate_demo.py", ["preprocess/simulate_demo.py"]),
    ],
)
def test_every_flag_is_documented_and_no_other(heading, scripts, parse):
    text = section("commands.md", heading)
    tables = [row for row in rows(text) if row[0].startswith("`")]
    cells = [row[0] + (row[1] if row[0].endswith(".py`") else "") for row in tables]
    documented = {flag for cell in cells for flag in re.findall(r"(?<![\w-])--\w+", cell)}
    existing = set().union(*(flags_of(script, parse) for script in scripts))
    assert documented == existing


@pytest.mark.parametrize("script", ["main.py", *(f"preprocess/{path.name}" for path in PROGRAMS)])
def test_every_flag_has_a_help(script, parse):
    assert [flag for flag, text in flags_of(script, parse).items() if not text] == []


def test_the_help_lists_every_model(parse):
    text = flags_of("main.py", parse)["--model"]
    assert all(re.search(rf"\b{name}\b", text) for name in MODELS)


def test_every_flag_is_documented_with_the_modes_that_read_it():
    table = [row for row in rows(section("commands.md", "main.py")) if row[0].startswith("`--") and len(row) == 4]
    documented = {re.match(r"`--(\w+)", flag)[1]: modes for flag, _, _, modes in table}
    assert documented.pop("mode") == "all" and len(documented) == len(table) - 1
    found = {}
    for flag, cell in documented.items():
        named = set(re.findall(r"`(\w+)`", cell))
        assert named <= set(main.MODES) and re.fullmatch(r"(all but )?`\w+`(, `\w+`)*", cell), cell
        found[flag] = set(main.MODES) - named if cell.startswith("all but ") else named
    assert found == {flag.name: set(flag.modes) for flag in main.COMMAND_LINE.flags}
    extraction = section("commands.md", "preprocess/extract_features_uni.py")
    of_one_mode = {f.name: f.modes for f in extract_features_uni.COMMAND_LINE.flags if len(f.modes) == 1}
    listed = re.findall(r"^\| `--(\w+)` \| .*\(`(\w+)` only\)", extraction, flags=re.MULTILINE)
    assert {name: (mode,) for name, mode in listed} == of_one_mode


def test_flags_are_documented_with_their_key_and_its_default():
    values = load_defaults()
    text = (ROOT / "docs" / "commands.md").read_text()
    named = re.findall(r"^\| `--(\w+)` \| .*\(`([A-Z]+\.\w+)`\) \|(.*)\| .* \|$", text, flags=re.MULTILINE)
    keys = {flag.name: flag.key.partition("=")[0] for flag in main.COMMAND_LINE.flags if flag.key}
    assert {flag: key for flag, key, _ in named} == keys
    for flag, key, default in named:
        if default.strip() and default.strip() not in ("of the configuration", "looked for"):
            assert yaml.safe_load(default.strip(" `")) == values[key], flag


def load_defaults() -> dict[str, object]:
    return {
        f"{name}.{field.name}": field.default for name, part in SECTIONS.items() for field in dataclasses.fields(part)
    }


def test_every_key_of_the_configuration_is_documented_with_its_default():
    table = re.findall(r"^\| `([A-Z]+\.\w+)` \| `(.*?)` \|", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    documented = {key: yaml.safe_load(default) for key, default in table}
    assert documented == load_defaults()
    assert len(documented) == len(table), "a key is listed twice"


def test_the_differences_of_the_data_sets_are_the_ones_of_their_files():
    part = section("commands.md", "Configuration").split("### What the data sets change\n")[1].partition("\n#")[0]
    head, _, *body = rows(part)
    configs = [load_config(name.strip("`")).to_dict() for name in head[1:]]
    listed = {row[0].strip("`"): [yaml.safe_load(cell) for cell in row[1:]] for row in body}
    differing = {
        f"{name}.{key}": [config[name][key] for config in configs]
        for name, keys in configs[0].items()
        for key in keys
        if len({config[name][key] for config in configs}) > 1 and key != "type"
    }
    assert listed == differing


# -- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = []
    for target in targets:
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors_of(linked)):
            broken.append(target)
    assert broken == []


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_of_the_program_that_a_page_names_exist(page):
    named = re.findall(
        r"(?<![\w/])(?:main\.py|engine\.py|(?:modes|models|datasets|evaluation|preprocess|utils|tests|benchmarks)/[\w/]+\.py)",
        page.read_text(),
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/[\w.]+)\)", (ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_no_place_of_one_machine(page):
    assert re.findall(r"(?<![\w.])/(?:tmp|work|home|root|mnt|Users)/\S*", page.read_text()) == []


def test_the_picture_of_the_readme_is_there_and_small():
    picture = ROOT / "docs" / "images" / "overview.png"
    assert picture.stat().st_size < 600e3 and picture.with_suffix(".svg").is_file()
    assert "docs/images/overview.png" in (ROOT / "README.md").read_text()
