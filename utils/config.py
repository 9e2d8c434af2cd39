"""Configuration: frozen dataclasses, filled by defaults < YAML < command line; an unknown key is an error.

The defaults are the paper's values for HER2ST. A YAML file may hold only what differs from them; those of the three data sets
of the paper write all of its values out.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from utils.files import reading, write_text
from utils.text import brief, located, parse_yaml, some

CONFIG_DIR = Path(__file__).resolve().parents[1] / "config"


@dataclass(frozen=True)
class General:
    seed: int = 2021
    log_path: str = "logs"
    exp_id: int = 0


@dataclass(frozen=True)
class Data:
    type: str = "her2st"
    data_dir: str = "data"
    patch_size: int = 224  # px at level 0
    patch_um: float | None = (
        None  # width in micrometres that every patch is scaled from; None: patch_size px at level 0
    )
    num_neighbors: int = 5  # tiles a side
    num_genes: int = 250
    genes: str | None = None  # the panel: a file of names, or the names with commas; None: chosen by the protocol
    encoder: str = "uni"
    weights: str | None = None  # file of the encoder's weights; None: looked for (weights/README.md)
    tokens: str = (
        "auto"  # auto | cache | online: where the target tokens come from; pooled: the pooled feature is the one
    )
    residence: str = "auto"  # auto | device | host | disk: where features and tokens are held
    num_workers: int = 2  # threads that read tokens


@dataclass(frozen=True)
class Model:
    name: str = "gene_dml"  # a row of models/table.py
    projection_dim: int = 512
    neighbor_depth: int = 4
    neighbor_heads: int = 4
    neighbor_mlp_ratio: float = 4.0
    neighbor_dropout: float = 0.3
    global_depth: int = 5
    global_heads: int = 8
    global_mlp_ratio: float = 4.0
    global_dropout: float = 0.3
    fusion_heads: int = 1
    fusion_mlp_dim: int = 1024
    fusion_dropout: float = 0.1
    gene_dropout: float = 0.3
    gene_mlp_dim: int = 1024
    gene_mlp_dropout: float = 0.1
    predictor_dim: int = 1536
    predictor_dropout: float = 0.1
    use_neighbor: bool = True
    use_global: bool = True


@dataclass(frozen=True)
class Loss:
    instance_weight: float = 1.0  # 0 leaves the instance-level term out
    group_weight: float = 0.8  # lambda of the paper; 0 leaves the instance-group term out
    instance_temperature: float = 0.07
    group_temperature: float = 0.07
    k: int = 18
    use_kmeans: bool = False  # False: spectral clustering, as without --use_kmeans on the command line
    normalize_fused: bool = False


@dataclass(frozen=True)
class Training:
    batch_size: int = 512
    epochs: int = 200
    patience: int = 20
    learning_rate: float = 1e-4
    weight_decay: float = 0.0  # decoupled (AdamW), of matrices; 0: Adam, as in the paper
    lr_step_epochs: int = 20
    lr_decay: float = 0.95
    start_at_mean: bool = False  # output biases start at the training mean instead of near zero (not in the paper)
    precision: str = "auto"  # auto | float32 | bf16 | fp16
    slides_per_batch: int = 0  # 0: spots of all slides are mixed, as in the paper


@dataclass(frozen=True)
class Evaluation:
    protocol: str = "clean"  # clean | paper
    fixed_epochs: int | None = None  # a number of epochs set beforehand, instead of choosing one
    chunk_size: int = 256  # spots that pass the model at a time


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; sections in capitals as in the YAML files."""

    GENERAL: General = field(default_factory=General)
    DATA: Data = field(default_factory=Data)
    MODEL: Model = field(default_factory=Model)
    LOSS: Loss = field(default_factory=Loss)
    TRAINING: Training = field(default_factory=Training)
    EVALUATION: Evaluation = field(default_factory=Evaluation)

    def to_dict(self) -> dict[str, dict[str, object]]:
        return dataclasses.asdict(self)


SECTIONS: dict[str, type] = typing.get_type_hints(Config)
_TYPES = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
KEYS = tuple(f"{name}.{f.name}" for name, section in SECTIONS.items() for f in dataclasses.fields(section))
# --model_size large: UNI2-h features with the sizes of HER2ST, whatever the data set.
LARGE = (
    "DATA.encoder=uni2-h",
    *(f"MODEL.{f.name}={f.default}" for f in dataclasses.fields(Model) if f.name.startswith(("neighbor_", "global_"))),
)
_CHOICES = {
    "DATA.tokens": ("auto", "cache", "online", "pooled"),
    "DATA.residence": ("auto", "device", "host", "disk"),
    "TRAINING.precision": ("auto", "float32", "bf16", "fp16"),
    "EVALUATION.protocol": ("clean", "paper"),
}
# What keys are called elsewhere, and were called as flags.
_OTHER_NAMES = {
    "lr": "TRAINING.learning_rate",
    "lr_gamma": "TRAINING.lr_decay",
    "lr_step_size": "TRAINING.lr_step_epochs",
    "lambda": "LOSS.group_weight",
    "num_clusters": "LOSS.k",
    "no_instance_loss": "LOSS.instance_weight",
    "no_neighbor": "MODEL.use_neighbor",
    "no_global": "MODEL.use_global",
}
# Keys that earlier versions saved with a run, and the value with which it trained as every run does now.
_REMOVED = {"TRAINING.compile": False, "LOSS.kmeans_init": "first"}
# What may change between the start of a run and its continuation, since no result depends on it.
MAY_CHANGE = {
    "DATA.data_dir",
    "DATA.weights",
    "DATA.residence",
    "DATA.num_workers",
    "GENERAL.log_path",
    "EVALUATION.chunk_size",
}
_BOUND = 2**63  # of whole numbers
_LARGEST = 10**6  # of MODEL and DATA; sizes in memory are products of such numbers
_MOST_PROBLEMS = 10  # in a message
_MAY_BE_ZERO = {
    "TRAINING.weight_decay",
    "GENERAL.seed",
    "GENERAL.exp_id",
    "DATA.num_workers",
    "LOSS.instance_weight",
    "LOSS.group_weight",
    "TRAINING.slides_per_batch",
}


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read `config/<name>.yaml` (or a YAML file by path) over the defaults, then `SECTION.key=value` overrides.

    Raises ValueError that lists every problem at once: unknown keys with the nearest valid key, wrong types, values
    out of range.
    """
    path = _config_path(name_or_path)
    values, problems = _flatten(_read(path), str(path))
    _override(values, overrides, problems)
    return _build(values, problems)


def find_key(name: str) -> str | None:
    """Return the key of that name without its section, or the one that is called so elsewhere; None if there is none."""
    return _OTHER_NAMES.get(name) or next((key for key in KEYS if key.rpartition(".")[2] == name), None)


def config_label(name_or_path: str | Path) -> str:
    """What a configuration is called in the folder of its runs: "her2st/dml", or the name of a YAML file elsewhere."""
    if (CONFIG_DIR / f"{name_or_path}.yaml").is_file():
        return str(name_or_path)
    path = _config_path(name_or_path).resolve()
    inside = path.is_relative_to(CONFIG_DIR)
    return str(path.relative_to(CONFIG_DIR).with_suffix("")) if inside else path.stem


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """The configuration with `SECTION.key=value` overrides."""
    values, problems = _flatten(config.to_dict(), "")
    _override(values, overrides, problems)
    return _build(values, problems)


def config_from_dict(content: Mapping, source: str) -> Config:
    """The configuration saved in a checkpoint; `source` names it in errors. Keys that are no more are left out."""
    values, problems = _flatten(content, source)
    return _build({key: found for key, found in values.items() if key not in _REMOVED}, problems)


def read_config(path: str | Path) -> Config:
    """The resolved configuration that a run has saved, with which it goes on.

    Keys that are no more are left out; ValueError if the run trained with what they switched on, or a section is lost.
    """
    content = _read(Path(path))
    if lost := [section for section in SECTIONS if section not in content]:
        raise ValueError(
            f"{path} {f'lacks {some(lost)}' if content else 'is empty'}; expected the whole configuration of the run, as it "
            "was saved at its start. Restore the file: the same command with another --run_name begins a run with the same "
            "one, to be copied; or start another run with --run_name NAME."
        )
    gone = [
        f"{key} {value!r}"
        for key, (value, _) in _flatten(content, str(path))[0].items()
        if key in _REMOVED and value != _REMOVED[key]
    ]
    if gone:
        raise ValueError(f"{path}: the run trained with {', '.join(gone)}, which is no more; it cannot go on.")
    return config_from_dict(content, str(path))


def differences(run: Config, asked: Config, other: str = "asked for", *, but_for: Collection[str] = ()) -> list[str]:
    """One line "SECTION.key: the run has ..., asked for ..." for every key in which two configurations differ.

    other: what the second one is called in place of "asked for".  but_for: keys that may differ.
    """
    before, now = run.to_dict(), asked.to_dict()
    return [
        f"{section}.{key}: the run has {before[section][key]!r}, {other} {value!r}"
        for section, values in now.items()
        for key, value in values.items()
        if before[section][key] != value and f"{section}.{key}" not in but_for
    ]


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML, whole or not at all."""
    write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False))


def _read(path: Path) -> Mapping:
    with reading(path, "a configuration (YAML)"):
        content = parse_yaml(path.read_text(encoding="utf-8"))
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected sections ({', '.join(SECTIONS)}), found {type(content).__name__}.")
    return content


def _config_path(name_or_path: str | Path) -> Path:
    named = str(name_or_path) if Path(name_or_path).suffix in (".yaml", ".yml") else f"{name_or_path}.yaml"
    for candidate in (Path(name_or_path), CONFIG_DIR / named):
        if candidate.is_file():
            return candidate
    known = sorted(str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in CONFIG_DIR.rglob("*.yaml"))
    raise FileNotFoundError(
        f"There is no configuration {located(name_or_path)}"
        + ("" if Path(name_or_path).is_absolute() else f": neither a file of that path nor {CONFIG_DIR / named}")
        + f". Known: {', '.join(known)}."
    )


def _flatten(content: Mapping, source: str) -> tuple[dict[str, tuple[object, str]], list[str]]:
    """{"SECTION.key": (value, where it was found)} and the problems of the structure."""
    values, problems = {}, []
    for section, entries in content.items():
        if section not in SECTIONS:
            problems.append(f"{source}: unknown section {brief(section)}{_nearest(str(section), SECTIONS)}")
        elif not isinstance(entries, Mapping):
            problems.append(f"{source}: section {section} should hold keys, found {brief(entries)}")
        else:
            for key, value in entries.items():
                values[f"{section}.{key}"] = (value, f"{source}: ")
    return values, problems


def _build(values: Mapping[str, tuple[object, str]], problems: list[str]) -> Config:
    sections: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
    for key, (value, source) in values.items():
        if key not in KEYS:
            problems.append(f"{source}unknown key {brief(key)}{_nearest(key, KEYS)}")
            continue
        section, name = key.split(".", 1)
        try:
            sections[section][name] = _typed(key, value)
        except ValueError as error:
            problems.append(f"{source}{error}")
    if problems:
        more = [f"... and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
        shown = ["the configuration is not valid:", *problems[:_MOST_PROBLEMS], *more]
        raise ValueError("\n  ".join(shown) if problems[1:] else problems[0])
    return Config(**{name: section(**sections[name]) for name, section in SECTIONS.items()})


def _override(values: dict[str, tuple[object, str]], overrides: Iterable[str], problems: list[str]) -> None:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            problems.append(f"--set {override}: expected SECTION.key=value")
            continue
        values[key.strip()] = (_parsed(key, text, problems), "command line: ")


def _parsed(key: str, text: str, problems: list[str]) -> object:
    try:
        with reading(f"--set {key}", "SECTION.key=value", remedy="Quote what is text."):
            return parse_yaml(text) if text.strip() else ""
    except ValueError as error:
        problems.append(f"command line: {error}")
        return text


def _nearest(key: str, known: Collection[str]) -> str:
    """The closest valid key, also for a key without its section; all keys of the section when nothing is close."""
    called = find_key(key.rpartition(".")[2])
    if called in known:
        return f"; did you mean {called!r}?"
    by_last_part = {name: name for name in known} | {name.split(".")[-1]: name for name in known}
    close = difflib.get_close_matches(key, sorted(by_last_part), n=1, cutoff=0.6)
    if close:
        return f"; did you mean {by_last_part[close[0]]!r}?"
    section = key.split(".")[0]
    return f"; known: {', '.join(sorted(name for name in known if name.startswith(section)) or sorted(SECTIONS))}"


def _typed(key: str, value: object) -> object:
    """`value` in the type that the dataclass declares, or ValueError saying what was expected and found."""
    section, name = key.split(".", 1)
    declared = _TYPES[section][name]
    allowed = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    if value is None and type(None) in allowed:
        return None
    expected = next(kind for kind in allowed if kind is not type(None))
    if expected is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-4 as text
    if expected is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _BOUND:
        value = float(value)
    if type(value) is not expected:
        raise ValueError(f"{key} should be {_describe(expected)}, found {brief(value)}")
    if isinstance(value, int) and abs(value) >= _BOUND:
        raise ValueError(f"{key} should be a number of at most 63 bits, found {brief(value)}")
    _check_value(key, value)
    return value


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _describe(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names[kind]


def _check_value(key: str, value: object) -> None:
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ValueError(f"{key} should be one of {', '.join(_CHOICES[key])}, found {brief(value)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value) or value < 0 or (value == 0 and not _zero_is_valid(key)):
        raise ValueError(
            f"{key} should be {'zero or more' if _zero_is_valid(key) else 'more than zero'}, found {brief(value)}"
        )
    if value > _LARGEST and key.startswith(("MODEL.", "DATA.")):
        raise ValueError(f"{key} should be at most {_LARGEST:,}, found {brief(value)}")
    if key.endswith("dropout") and value >= 1:
        raise ValueError(f"{key} should be below 1, found {brief(value)}")
    if key == "DATA.num_neighbors" and value % 2 == 0:
        raise ValueError(f"{key} should be odd (the spot's own tile is in the middle), found {brief(value)}")


def _zero_is_valid(key: str) -> bool:
    return key in _MAY_BE_ZERO or key.endswith("dropout")
