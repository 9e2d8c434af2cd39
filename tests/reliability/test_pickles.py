"""Pickles: a prepared file runs no code, builds no object of NumPy and reaches no memory."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from tests.test_architecture import ROOMS, ROOT, sources, tree
from utils.files import load_names
from utils.untrusted.npy import strings_of_npy

NAMES = ["GNAS", "ERBB2", "GNAS", "ACTG1", "名前", "x" * 300]
# An array of objects whose pointers are eight bytes of the file: unpickled by NumPy it ends in a SIGSEGV.
CRAFTED = base64.b64decode(
    "k05VTVBZAQB2AHsnZGVzY3InOiAnfE8nLCAnZm9ydHJhbl9vcmRlcic6IEZhbHNlLCAnc2hhcGUnOiAoMSwpLCB9ICAgICAgICAgICAgICAgICAgICAg"
    "ICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIAqAA2NudW1weS5jb3JlLm11bHRpYXJyYXkKX3JlY29uc3RydWN0CihjbnVtcHkK"
    "bmRhcnJheQooSgAAAAB0QgEAAABidFIoSgEAAAAoSgEAAAB0Y251bXB5CmR0eXBlCihYAgAAAE84iYh0UihKAwAAAFgBAAAAfE5OTkr/////Sv////9K"
    "AAAAAHRiiUIIAAAAQUFBQUFBQUF0Yi4="
)
HEADER = CRAFTED[: CRAFTED.index(b"\n") + 1]


def npy(pickled: bytes, header: bytes = HEADER) -> bytes:
    return header + pickled


def header(descr: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("names", [NAMES, ["ONE"], [f"GENE{i}" for i in range(3000)]])
def test_published_panels_of_every_protocol_and_numpy_are_read(protocol, module, names, tmp_path):
    array = np.array(names, dtype=object)
    pickled = pickle.dumps(array, protocol=protocol)
    ours = b"numpy._core.multiarray" if b"numpy._core" in pickled else b"numpy.core.multiarray"
    # as the other generation of NumPy writes it; protocols from 4 on store lengths, of the name and of the frame
    if ours != module and protocol >= 4:
        pickled = pickletools_without_frames(pickled).replace(bytes([len(ours)]) + ours, bytes([len(module)]) + module)
    else:
        pickled = pickled.replace(ours, module)
    assert module in pickled
    path = tmp_path / "genes.npy"
    path.write_bytes(npy(pickled, header("|O", (len(names),))))
    assert strings_of_npy(path.read_bytes()) == names


def pickletools_without_frames(pickled: bytes) -> bytes:
    while (place := pickled.find(pickle.FRAME)) == 2:
        pickled = pickled[:place] + pickled[place + 9 :]
    return pickled


def test_what_numpy_saves_is_read(tmp_path):
    np.save(tmp_path / "object.npy", np.array(NAMES, dtype=object), allow_pickle=True)
    np.save(tmp_path / "column.npy", np.array(NAMES, dtype=object)[:, None], allow_pickle=True)
    np.save(tmp_path / "plain.npy", np.array(NAMES))
    np.save(tmp_path / "big_endian.npy", np.array(NAMES).astype(">U300"))
    for file in tmp_path.iterdir():
        assert strings_of_npy(file.read_bytes()) == NAMES, file.name


class Evil:
    def __reduce__(self):
        return (os.system, ("touch gene_dml_evil_was_here",))


class AsWritten:
    """Pickles as the call and the state that it is given."""

    def __init__(self, function, arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def array_pickled(dtype: object, payload: object, version: int = 1) -> bytes:
    """The pickle of an array whose dtype and payload are someone's choice."""
    reconstruct = np.array(["A"], dtype=object).__reduce__()[0]
    return pickle.dumps(AsWritten(reconstruct, (np.ndarray, (0,), b"b"), (version, (1,), dtype, False, payload)), 3)


def dtype_pickled(*arguments: object, state: tuple) -> AsWritten:
    return AsWritten(np.dtype, arguments, state)


OBJECT_STATE = (3, "|", None, None, None, -1, -1, 63)
PLAIN = dtype_pickled("O8", False, True, state=OBJECT_STATE)
POINTERS = b"AAAAAAAA"
FIELDS = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
WRONG = {
    "flags cleared": CRAFTED[len(HEADER) :],
    "bytes as pointers": array_pickled(PLAIN, POINTERS),
    "fields with an object": array_pickled(dtype_pickled("V8", False, True, state=FIELDS), POINTERS),
    "void": array_pickled(np.dtype("V8"), POINTERS),
    "numbers": array_pickled(np.dtype("i8"), POINTERS),
    "bytes in the list": array_pickled(PLAIN, [b"A"]),
    "two strings for a shape of one": array_pickled(PLAIN, ["A", "B"]),
    "no list": array_pickled(PLAIN, ("A",)),
    "another version of the state": array_pickled(PLAIN, ["A"], version=2),
    "scalars": pickle.dumps(np.array([np.str_("A")], dtype=object), 3),
    "a scalar": pickle.dumps(np.str_("A"), 3),
    "code": pickle.dumps(np.array([Evil()], dtype=object)),
    "bare code": pickle.dumps(Evil()),
    "a list": pickle.dumps(["A"]),
    "a dictionary": pickle.dumps({"A": 1}),
    "an array of numbers": pickle.dumps(np.arange(3)),
    "nothing": b"",
    "no end": pickle.dumps(np.array(["A"], dtype=object))[:-1],
    "no start": b"\x80\x03.",
    "a frame without end": b"\x80\x04\x95" + b"\xff" * 8,
    "a string without end": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f",
    "a memo of terabytes": b"\x80\x03Nr\xff\xff\xff\xff.",
    "a list that holds itself": b"\x80\x03]q\x00h\x00a.",
    "nested deeply": b"\x80\x03" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "an instance": b"(i__builtin__\nobject\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent object": b"Pname\n.",
}


@pytest.mark.parametrize("kind", WRONG)
def test_every_other_pickle_is_a_clean_error(kind, tmp_path):
    path = tmp_path / "genes.npy"
    path.write_bytes(npy(WRONG[kind]))
    with pytest.raises(ValueError, match=r"genes\.npy cannot be read as an array of names \(\.npy\): ") as caught:
        load_names(path)
    assert len(str(caught.value)) < 600
    assert not os.path.exists("gene_dml_evil_was_here")


@pytest.mark.parametrize(
    "content",
    [
        header("<U10", (10**10,)) + b"A\0\0\0",
        header("|O", (10**11,)) + pickle.dumps(np.array(["A"], dtype=object)),
        header("<U1000000000", (1,)),
        header("<U1", (-1,)),
        header("<i8", (3,)) + bytes(24),
        header("<U1", (2,)).replace(b"'fortran_order': False, 's", b"'fort                    ", 1) + bytes(8),
        b"PK\x03\x04" + bytes(30),
        b"\x93NUMPY\x03\x00" + header("<U1", (1,))[8:] + b"A\0\0\0",
        header("<U1", (1,)) + b"\xff\xff\xff\xff",  # no character
        b"",
    ],
)
def test_headers_are_compared_with_the_file_before_anything_is_allocated(content, tmp_path):
    path = tmp_path / "genes.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"genes\.npy cannot be read as an array of names"):
        load_names(path)


def test_every_cut_and_many_changed_bytes_are_clean_errors_or_names(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array(NAMES[:4], dtype=object), allow_pickle=True)
    content, path = file.getvalue(), tmp_path / "genes.npy"
    generator = np.random.default_rng(0)
    changed = [content[:length] for length in range(len(content))]
    for _ in range(600):
        place = generator.integers(len(content))
        changed.append(content[:place] + bytes([generator.integers(256)]) + content[place + 1 :])
    for variant in changed:
        path.write_bytes(variant)
        try:
            names = load_names(path)
        except ValueError as error:
            assert "genes.npy" in str(error)
        else:
            assert all(type(name) is str for name in names)


SAFE_LOADER = ROOT / "utils" / "untrusted" / "tensors.py"
PICKLES = ("read_pickle", "Unpickler")  # of whatever
UNPICKLES = ("pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")
UNPICKLES += ("torch.jit.load", "torch.hub", "torch.package", "torch.serialization", "pandas.io.pickle")


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute of one; what it is an attribute of is left out where that is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".strip(".")
    return node.id if isinstance(node, ast.Name) else ""


def unpickled(code: ast.AST, *, is_loader: bool = False, is_program: bool = True) -> list[str]:
    """What in a piece of code may unpickle: names as they are imported, arguments, and loads of PyTorch that are not safe.

    is_loader: the one place of the program where PyTorch loads. is_program: elsewhere the safe loader is good enough.
    """
    nodes, called, found = list(ast.walk(code)), {}, []
    modules = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names = {
        alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
        for alias in modules
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            called[id(node.func)] = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            found += [
                word.arg for word in node.keywords if word.arg == "allow_pickle" and ast.unparse(word.value) != "False"
            ]
    uses = [(name, {}) for name in {*names.values(), *(alias.name for alias in modules)}]
    for node in nodes:
        first, _, rest = dotted(node).partition(".")
        if first in names or rest in PICKLES or first in PICKLES:
            uses.append((f"{names.get(first, first)}.{rest}".strip("."), called.get(id(node), {})))
    for name, words in uses:
        is_safe = (is_loader or not is_program) and words.get("weights_only") is True
        if (name == "torch.load" and not is_safe) or name.rpartition(".")[2] in PICKLES:
            found.append(name)
        if any(f"{name}.".startswith(f"{wrong}.") for wrong in UNPICKLES):
            found += [] if is_loader and name in ("pickle", "pickle.UnpicklingError") else [name]
    return found


def may_unpickle(path: Path) -> bool:
    """Whether a file has any of the words at all: most need not be parsed."""
    return (
        re.search(r"pickl|\bload\b|dill|joblib|shelve|marshal|hub|package|serialization", path.read_text(), re.I)
        is not None
    )


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=True)",  # not where the checksums are verified
        "import torch as t\nt.load(path, weights_only=False)",
        "import torch.nn\ntorch.load(path)",
        "from torch import load",
        "import torch\nread = torch.load",
        "import torch\ntorch.serialization.load(path)",
        "import torch.serialization as loader",
        "import pickle",
        "from pickle import loads as parse",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=allowed)",
        "import pandas as pd\npd.read_pickle(path)",
        "import dill, joblib",
    ],
)
def test_whatever_unpickles_is_found(code):
    assert unpickled(ast.parse(code))


def test_the_safe_loader_says_so_in_words():
    loads = "import pickle, torch\ntorch.load(path, weights_only={})\npickle.{}"
    assert unpickled(ast.parse(loads.format("True", "UnpicklingError")), is_loader=True) == []
    assert unpickled(ast.parse(loads.format("is_safe", "UnpicklingError")), is_loader=True) == ["torch.load"]
    assert unpickled(ast.parse(loads.format("True", "loads")), is_loader=True) == ["pickle.loads"]
    assert unpickled(ast.parse("import torch\ntorch.load(path, weights_only=True)"), is_program=False) == []


def test_nothing_in_the_program_unpickles():
    """Nor in benchmarks, notebooks, scripts and pages; PyTorch's safe loader is called in one place of the program."""
    program = [path for room in ROOMS for path in sources(room)]
    assert SAFE_LOADER in program
    found = {path: unpickled(tree(path), is_loader=path == SAFE_LOADER) for path in program if may_unpickle(path)}
    beside = [
        path for folder in ("benchmarks", "docs", "scripts", "notebooks") for path in (ROOT / folder).rglob("*.py")
    ]
    found |= {path: unpickled(tree(path), is_program=False) for path in beside if may_unpickle(path)}
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith(("%", "!"))]
            if cell["cell_type"] == "code":
                found[path] = found.get(path, []) + unpickled(ast.parse("\n".join(lines)), is_program=False)
    for path in (ROOT / "scripts").rglob("*.sh"):
        found[path] = re.findall(r"\w*pickle|torch\.load|joblib|\bdill\b", path.read_text())
    assert {str(path.relative_to(ROOT)): names for path, names in found.items() if names} == {}


def test_strings_come_from_the_file_alone():
    assert strings_of_npy(npy(array_pickled(PLAIN, ["A"]))) == ["A"]


def test_letters_beyond_unicode_are_refused(tmp_path):
    np.save(tmp_path / "genes_x.npy", np.array(["TP53", "CD3E"]))
    content = bytearray((tmp_path / "genes_x.npy").read_bytes())
    content[-1] = 0xF8
    (tmp_path / "genes_x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"genes_x\.npy cannot be read .*numbers where letters were expected"):
        load_names(tmp_path / "genes_x.npy")
