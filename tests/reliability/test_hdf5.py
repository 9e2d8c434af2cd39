"""HDF5: no file, however damaged, may crash this process, hold it for ever, or make it reserve what the file does not hold."""

from __future__ import annotations

import base64
import fcntl
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from utils.untrusted import hdf5
from utils.untrusted.hdf5 import opened_hdf5, probe_hdf5

# An .h5ad with one byte inserted and its last one cut: as long as it says, and HDF5 reads it in a circle for ever.
ENDLESS = lzma.decompress(
    base64.b85decode(
        "T>t<81poj4|NsC0{{Tdi1cYyTdv{92W>0Dz4{~W97|b6F=cNyM)zF=nHCVvNm5I@lt2wiL$6kpx7`O$aa&F~C^XYi{BS&eqaDU|rD`Gh+6d2PY"
        "p|G;8a%rN8>{wR0-FxU<E3s!-&Cc#tw!>q*8`b+|hhNe>zpIwOb(ieWzYfpJ)0G1H%E28($a@Kb_fg8Cr~waU=EBbtTh3#i-U#3jypOTvZ3Z|G"
        "F0V1NB{^_s;!g6U0oR+&p)fE7${rDk_x8r&Vex5if;1}GZpgT{TABSf1ha>xA&Vf8zg+v^_3_^K&Lb3^M3Bot6p*<T2|Eu`ayl@Fj-Y@&=n3%^"
        "k(t;cVYR8{Ailtkni-gT;zusOv~^yJX?oR=X{NLa;(3&6*5k#REKap6A<6gb3rKOT`iv&#!(5SODLLG%Z{BkR+d|P)5`Kuj&#`QKz0=O*@n-ds"
        ">qM-7hrKof7kr=TWzqBa|5-L+XZ)~iVu@+gE-_sP;VUzv3)%ltq`wpOfI8tnD`3@W_|fS6n$_CF<~bzo$19J|XPv2us(dFOJ!1=Rr-7ydfOK}*"
        "Y2)3(Q6^hKklexw>{P4gL`0}Afv0=xwaN!q1}vsSUYd941<;XQO%F^+;ev8m?MT<*v3M4=cRRNU;aehbGQBn4>3He^mIzSx9{Z)a%H1n~!dDbo"
        "wr$Hc4Lc}oDKe)lE=*}sy7J-J6QTg1Q_pjgjwSoW3O$elP<PWhO9l6Xa+r&MjCqjE$beO-l)j<VRv@6M3O26yC?AJX9Z5Y7NkV;AY;6a!_9ffu"
        "q0(W8+awNJsi$75q!kpjOnVvuj3on@qMk6V{uxxebF<>6*N3+<L_MEdbxqjX;08ZsUDhdELi)RssCZlL5WNg!n=LZVZqG`ElHh`TP7R@~im?^|"
        "KN~g*_IYwGy9d&~j(I!h1@uR~T)g?B`GpCREBSj|lj|I^Bt;vlGIeH;OZ_=oReeqNSMX7RFE9;i0nY+b)YGFGRwks%W+GUao;FfS=Ru=B_$TXQ"
        "w~mRv+y_&<-xk~*9<V*i3PHB-RA!;&WpPWM6=tDBd-gVJ&saJVRUA1tmofzwCt?In^j-E$rKw86@Kh%eI8DuTg%*xG_QSTy-g<k-@klFuRMIb!"
        "sfiw(CqFIT0S(S1c+{>4lW`VgqN6$*nFHLm)yf5fl2kg8R0rJG0s3kHsGYsFyXBNxGvJW8M?pc!DC-o)`tn2zZh*r<xuov=6vsZTM^}?l?XS|L"
        "(jJC0XcjXCthxxqcuWS_%#V);-+wixBGwe1|0XBt@1O*h)X=a@+nLlAO;7|y(FR2w2(SQzr1`bZM;PzCpvx48hCy|A3x|lsWwY{6zq8K&+8c%="
        "Uk>|0r36~!=M^bs&@RU2bG5+_wX3m^4$Z3q0n1}6CyuxeU0o)Z`DOgMs$bk0n$mIsEnEe<!r(cNb@AN<ca!t<dTQK!&TmBYo;Nr2wnUp31+GjP"
        "%Px|cfWy#hB5QD1!GwiPipoZjZlHDKTqw6DA8#heS8A!_-Js9j5Kc)%X43t_J!p+7rRS}xh1?VUAizo$^BCAoT(3W|REE!JqoYxx4}iyxN@I|R"
        "vT#+{o8-4TB@S1fKcQ#Syy$KSRB;-gL%%QZG9P_U`Cw$wm($T^RRV*sr5D0PElev|)#c|w8rxUG6=#1k0N596pIUj@WBtNL*3)cQ_ZxHUEU+Uh"
        "6}97j|6zfrs{kRqBm6nR!H{ho)pYtq`>h)R>~s*6IpdnX!?|US)1<qCZfly^#2(5ye}>vK*Uh2%_BUcbj2dAHv9M<HEiM6je&|)he7QxK!xU`7"
        "DiAjOJ@8ScTrS`t{b^8`lAG8}@WU?B9cJ?|cCDxI<Z&29GDwZ>jrAYFZesvI32}GlaY(X;F^lEwn?DJlxGl<9<mYm8B;++WFWd6ZX7u)r9H?tz"
        "pY+T7DZb0$ah0B`Fv>r#zf$a*UOrdC;Z)7X@`3SCDMpQ|#zP=XnM3_P5ZqH1Qz7RTaUGNp{(zf*bP|3lR)wR+mXjG~wtYm1W7=7Y7Q%%$l0RPS"
        "l416p7|a}!nKNrPvcHXjtLGkJ7lS`(bF>e~bggbm@5YU-J?8$Eqtou+r1KFQgtj`e;Qm7p6hQy(L8-ps3V4r49R>hzSXTiftRpXJtk^C(E7^^U"
        "A4Afs)cR;J%F&jRxyl!QhSX|h&1<!KDPCgNd>o6T*~&5@&N#NcTdF=W8fEp)LFU9u3}j;4cRSIPvozaYi&5>McJwpR{`h46UHXs@F>4xh3<+Ff"
        "`Y5-u!t0~I$+6?Q$CMjytz<hlV{V6e^pW*imwUW!mBevCGg@yj+i4Lqs{TLs?>)i"
    )
)
REMEDY = "Get it again."


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        probe_hdf5(path, "a table", REMEDY)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as a table: ") and message.endswith(REMEDY)
    assert len(message) < 700
    return message


def written(path: Path, fill: Callable[[h5py.File], object], **options) -> Path:
    with h5py.File(path, "w", **options) as file:
        fill(file)
    return path


def plain(file: h5py.File) -> None:
    file.attrs["title"] = "a table"
    file["matrix/data"] = np.arange(1000)
    file.create_dataset("matrix/packed", data=np.zeros((300, 40)), chunks=(7, 40), compression="gzip")
    file.create_dataset("names", data=np.array(["A", "B"], dtype=object), dtype=h5py.string_dtype())
    file["fixed"] = np.array([b"AB", b"C"])
    file["nothing"] = h5py.Empty("f4")
    file["empty"] = np.zeros((0, 3))
    file["scalar"] = "text"
    file["again"] = file["matrix"]
    file["types/boolean"] = np.dtype("i1")  # as other programs leave in an .h5ad


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}, {"userblock_size": 1024}])
def test_whole_files_of_all_generations_pass(options, tmp_path):
    path = written(tmp_path / "a.h5", plain, **options)
    probe_hdf5(path, "a table")
    with opened_hdf5(path, "a table") as file:
        assert file["matrix/data"][3] == 3


def test_a_probe_is_cheap(tmp_path):
    path = written(tmp_path / "a.h5", plain)
    probe_hdf5(path, "a table")  # starts the process
    start = time.perf_counter()
    for _ in range(20):
        probe_hdf5(path, "a table")
    assert time.perf_counter() - start < 20 * 0.1


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}])
def test_a_byte_more_or_less_is_told_from_the_length(options, tmp_path):
    content = written(tmp_path / "a.h5", plain, **options).read_bytes()
    path = tmp_path / "b.h5"
    for place in range(600, len(content), 1999):
        path.write_bytes(content[:place] + b"\0" + content[place:])
        assert "bytes were inserted or appended" in refusal(path)
    path.write_bytes(content[:-1])
    assert "it is truncated" in refusal(path)


def test_a_file_that_hdf5_reads_for_ever_is_given_up_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "_SECONDS", 2.0)
    monkeypatch.setattr(hdf5, "_WALKER", hdf5._Walker())  # one that has not worked on the files of other tests
    path = tmp_path / "endless.h5ad"
    path.write_bytes(ENDLESS)
    before = os.times()
    assert "finds no end of it within 2 seconds" in refusal(path)
    after = os.times()
    assert sum(after[2:4]) - sum(before[2:4]) < 10  # of the processor, by the process that was ended
    probe_hdf5(written(tmp_path / "a.h5", plain), "a table")


def test_a_whole_file_is_read_though_the_machine_is_busy(tmp_path, monkeypatch):
    """What counts is the time of the processor, of which a process that is kept waiting uses none."""
    path = written(tmp_path / "a.h5", plain)
    probe_hdf5(path, "a table")
    walker = hdf5._WALKER._process.pid
    monkeypatch.setattr(hdf5, "_SECONDS", 0.5)
    os.kill(walker, signal.SIGSTOP)
    waiting = threading.Timer(1.5, os.kill, (walker, signal.SIGCONT))
    waiting.start()
    probe_hdf5(path, "a table")
    waiting.join()
    assert hdf5._WALKER._process.pid == walker


def declared(shape, **options):
    def fill(file):
        file.create_dataset("barcodes", shape, dtype="S18", **options)

    return fill


@pytest.mark.parametrize(
    "fill",
    [
        declared((10**8,), chunks=(1000,), compression="gzip"),
        declared((10**8,), chunks=(10**8,)),
        declared((6 * 10**10,)),
        declared((10**12,), chunks=(10**6,)),
    ],
    ids=["chunks that are not there", "one large chunk", "nothing written", "terabytes"],
)
def test_declared_sizes_are_compared_with_the_file(fill, tmp_path):
    path = written(tmp_path / "a.h5", fill)
    assert path.stat().st_size < 20_000
    assert "barcodes declares" in refusal(path)


def test_what_lies_elsewhere_is_not_followed(tmp_path):
    other = written(tmp_path / "other.h5", plain)
    layout = h5py.VirtualLayout((1000,), "i8")
    layout[:] = h5py.VirtualSource(other, "matrix/data", (1000,))
    cases = {
        "external link": lambda file: file.__setitem__("x", h5py.ExternalLink(str(other), "/matrix/data")),
        "soft link": lambda file: file.__setitem__("x", h5py.SoftLink("/names")),
        "virtual": lambda file: file.create_virtual_dataset("x", layout),
        "external": lambda file: file.create_dataset("x", (3,), "i8", external=[(str(tmp_path / "raw"), 0, 24)]),
    }
    for kind, fill in cases.items():
        message = refusal(written(tmp_path / f"{kind}.h5", fill))
        assert "links are not followed" in message or "in other files, which are not read" in message


@pytest.mark.parametrize("content", [b"", b"\x89HDF", b"not at all" * 1000, b"\x89HDF\r\n\x1a\n" + b"\xff" * 1000])
def test_what_is_no_hdf5(content, tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(content)
    refusal(path)


def test_damage_anywhere_is_an_error_or_leaves_the_structure_whole(tmp_path):
    content = written(tmp_path / "a.h5", plain).read_bytes()
    generator, path, refused = np.random.default_rng(0), tmp_path / "b.h5", 0
    for _ in range(150):
        place = generator.integers(len(content))
        path.write_bytes(content[:place] + bytes([generator.integers(256)]) + content[place + 1 :])
        try:
            with opened_hdf5(path, "a table", REMEDY) as file:
                file["matrix/data"][:], file["names"].asstr()[:]
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 5


def test_a_lock_is_no_damage(tmp_path):
    path = written(tmp_path / "a.h5", plain)
    with open(path, "rb+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="it is locked") as caught, opened_hdf5(path, "a table"):
            pass
    assert "HDF5_USE_FILE_LOCKING=FALSE" in str(caught.value) and "damaged" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a table"), opened_hdf5(tmp_path / "a.h5", "a table"):
        pass


def test_the_walk_needs_nothing_of_this_program(tmp_path):
    """It starts quickly, and answers line by line."""
    path = written(tmp_path / "a.h5", plain)
    command = [sys.executable, "-P", str(Path(hdf5.__file__).with_name("walk_hdf5.py"))]
    done = subprocess.run(command, input=json.dumps(str(path)) + "\n", capture_output=True, text=True, cwd=os.sep)
    assert done.stdout == "null\n" and done.returncode == 0
