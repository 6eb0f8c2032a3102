"""Damaged and hostile files: each loads or is refused, quickly, in little memory, and none of them runs anything."""

import gc
import pickle
import pickletools
import random
import resource
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from nfnet_keras.checkpoints.formats import open_checkpoint
from nfnet_keras.checkpoints.pickles import open_pickle

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
TREE = {
    "NFNet/~/a": {"w": ARRAY, "gain": np.full((), 0.3, np.float32), "f": np.asfortranarray(ARRAY)},
    "NFNet/~/b": {"w": ARRAY.astype(">f8"), "again": ARRAY, "s": np.float16(1), "e": np.zeros((0, 2), np.int8)},
    "NFNet/~/c": {"w": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2), "b": ARRAY.astype(ml_dtypes.bfloat16)},
}
CODES = [ord(opcode.code) for opcode in pickletools.opcodes]
NUMBERS = [
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    struct.pack("<Q", 2**62),
    struct.pack("<Q", 2**40),
    b"\0" * 8,
]
EVIL = (
    b"\x8c\x05posix\x8c\x06system\x93\x8c\x10touch canary_fuzz\x85R",
    b"cposix\nsystem\nX\x10\0\0\0touch canary_fuzz\x85R",
    b"(iposix\nsystem\n",
    b"(cposix\nsystem\no",
)
HOSTILE = [
    *(b"\x80\x04" + evil + b"." for evil in EVIL),
    *(b"\x80\x04}\x8c\x01m}\x8c\x01w" + evil + b"ss." for evil in EVIL),
    b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.",
    b"\x80\x04\x8c\x05numpy\x8c\x19core.multiarray.__import__\x93.",
    b"\x80\x04\x8c\x08builtins\x8c\x0agetattr\x00\x00\x00\x93.",
    b"\x80\x02cnumpy\nndarray\n)\x81}b.",
    b"\x80\x04cnumpy\nndarray\n)}\x92.",
    b"\x80\x02cnumpy\ndtype\nX\x01\0\0\0O\x89\x88\x87R.",
    b"\x80\x02cnumpy\ndtype\nX\x02\0\0\0O8\x89\x88\x87R(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb.",
    b"\x80\x02}r\xff\xff\xff\x7f.",
    b"\x80\x02}r\xff\xff\xff\xff.",
    b"\x80\x02}j\xff\xff\xff\xff.",
    b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    b"\x80\x05\x96" + struct.pack("<Q", 2**63) + b"x.",
    b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    b"\x80\x03B\xff\xff\xff\xffx.",
    b"\x80\x02X\xff\xff\xff\xffx.",
    b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    b"\x80\x02\x8b\xff\xff\xff\xff1.",
    b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
    b"\x80\x02\x82\x01.",
    b"\x80\x02\x83\x01\x00.",
    b"\x80\x02\x84\x01\x00\x00\x00.",
    b"\x80\x02Pid\n.",
    b"\x80\x02NQ.",
    b"\x80\x05\x97\x98.",
    b"\x80\x02" + b"(" * 5_000 + b".",
    b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
    b"\x80\x02)" + b"\x85" * 50_000 + b".",
    b"\x80\x04)" + b"\x94h\x00\x86" * 20_000 + b".",
    b"\x80\x04}" + b"\x94" * 50_000 + b".",
    b"\x80\x02" + b"}" * 50_000 + b".",
    b"\x80\x02" + b"N" * 50_000 + b".",
    b"\x80\x04}\x94h\x00\x8c\x01mh\x00ss.",
    b"\x80\x04}\x94\x8c\x01mh\x00s.",
    b"\x80\x02I" + b"9" * 50_000 + b"\n.",
    b"\x80\x02c" + b"a" * 50_000 + b"\nb\n.",
    b"\x80\x02}X\x01\0\0\0m}X\x01\0\0\0wcnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\0\0\0f4\x89\x88\x87R"
    b"(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbC\x04\0\0\0\0\x86Rss.",
]

# What the hook below has seen that no reading of a file needs.
SEEN: list = []
_watched: list[str] = []
_FORBIDDEN = ("import", "exec", "compile", "pickle.find_class", "marshal.loads", "ctypes.dlopen")


def _hook(event, arguments):
    if not _watched:
        return
    writes = event == "open" and (arguments[0] != _watched[0] or arguments[1] not in ("r", "rb", None))
    if writes or event in _FORBIDDEN or event.startswith(("os.", "subprocess.", "socket.", "shutil.")):
        SEEN.append((event, repr(arguments)[:200]))


sys.addaudithook(_hook)
# The encoding of names in archives, which Python imports at its first use.
"".encode("cp437")


def old_numpy(content: bytes) -> bytes:
    for name in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + name, b"numpy.core." + name
        content = content.replace(b"c" + new, b"c" + old)
        content = content.replace(bytes([0x8C, len(new)]) + new, bytes([0x8C, len(old)]) + old)
    return content[:2] + content[11:] if content[2:3] == b"\x95" else content


def pickles() -> list[bytes]:
    new = [pickle.dumps(TREE, protocol) for protocol in (2, 3, 4, 5)]
    return new + [old_numpy(content) for content in new]


def mutated(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A file with one to four faults."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 30))
        fault = rng.randrange(9)
        if fault == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif fault == 1:
            data[place : place + 1] = bytes([rng.choice(CODES)])
        elif fault == 2:
            data[place:place] = bytes(rng.choice(CODES) for _ in range(length))
        elif fault == 3:
            data[place:place] = rng.randbytes(length)
        elif fault == 4:
            del data[place : place + length]
        elif fault == 5:
            del data[place:]
        elif fault == 6:
            number = rng.choice(NUMBERS)
            data[place : place + len(number)] = number
        elif fault == 7:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[place : place + rng.choice((0, length))] = other[start : start + rng.choice((8, 40, 200))]
        else:
            data[place:place] = rng.choice(EVIL)
    return bytes(data)


def stream(rng: random.Random) -> bytes:
    """A pickle of operations drawn at random, most with an argument of the right form."""
    parts = [b"\x80", bytes([rng.choice((2, 3, 4, 5))])]
    for _ in range(rng.randrange(1, 60)):
        opcode = rng.choice(pickletools.opcodes)
        parts.append(opcode.code.encode("latin-1"))
        size = 0 if opcode.arg is None else opcode.arg.n
        if size == pickletools.UP_TO_NEWLINE:
            parts.append(rng.choice((b"numpy\nndarray\n", b"os\nsystem\n", b"1\n")))
        elif size < 0:
            width = {"1": 1, "4": 4, "8": 8}[opcode.arg.name[-1]]
            length = rng.choice((0, 1, 2, 5)) if rng.random() < 0.95 else 2 ** (8 * width) - 1
            parts.append(length.to_bytes(width, "little") + rng.randbytes(min(length, 5)))
        else:
            parts.append(rng.choice((b"\0", b"\1", b"\2", rng.randbytes(1))) + b"\0" * (size - 1) if size else b"")
    return b"".join([*parts, b"."])


@pytest.fixture(autouse=True)
def only_new_garbage():
    """Leaves what other tests of the process hold out of collections, which could take seconds of an attempt's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def attempt(path: Path, content: bytes, opener=open_checkpoint, spare: int = 2**18) -> bool:
    """Open one file and read all of it; returns whether that went. Anything but a refusal is raised."""
    # Over the last file: making a new one takes longer than all the rest.
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(file.write(content))
    del SEEN[:]
    tracemalloc.reset_peak()
    # This thread's time: others of the process may be busy with what an earlier test left them.
    before, began = tracemalloc.get_traced_memory()[0], time.thread_time()
    _watched.append(str(path))
    try:
        for stored in opener(str(path)).arrays.values():
            array = stored.read()
            assert array.shape == stored.shape and array.dtype == stored.dtype
        return True
    except (ValueError, OSError) as error:
        assert "cannot load" in str(error), error
        return False
    finally:
        _watched.clear()
        assert not SEEN, (SEEN, content[:2000])
        assert time.thread_time() - began < 2, content[:2000]
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < 2 * len(content) + spare, (peak, content[:2000])


def hammer(path: Path, contents: list[bytes], count: int, seed: int) -> list[int]:
    """Try `count` mutations of some files; returns how many loaded and how many were refused."""
    rng = random.Random(seed)
    for content in contents:
        # Once without watching: the first use imports what it needs.
        path.write_bytes(content)
        assert [stored.read() for stored in open_checkpoint(path).arrays.values()]
    tracemalloc.start()
    loaded = sum(attempt(path, mutated(rng.choice(contents), contents, rng)) for _ in range(count))
    tracemalloc.stop()
    return [loaded, count - loaded]


def hammer_pickles(path: Path, count: int, seed: int) -> None:
    loaded, refused = hammer(path, pickles(), count, seed)
    # Faults in the numbers themselves load; most others are refused.
    assert min(loaded, refused) > count // 20
    rng = random.Random(seed)
    tracemalloc.start()
    for _ in range(count // 4):
        assert not attempt(path, stream(rng), open_pickle)
    tracemalloc.stop()


def tensors() -> list[bytes]:
    arrays = {f"stages.{i}.weight": ARRAY.astype(t) for i, t in enumerate(("f4", "f2", "?", ml_dtypes.bfloat16))}
    return [save(arrays, {"a": "b"}), save({"x": np.full((), 1.0)})]


def test_hostile_pickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in pickles():
        (tmp_path / "x").write_bytes(content)
        assert len(open_pickle(tmp_path / "x").arrays) == 9
    tracemalloc.start()
    loaded = [attempt(tmp_path / "x", content, open_pickle, spare=2**25) for content in HOSTILE]
    tracemalloc.stop()
    # The last of them is a harmless one, which shows that the others are refused for what they do.
    assert loaded == [False] * (len(HOSTILE) - 1) + [True]
    assert not (tmp_path / "canary_fuzz").exists()


def test_one_array_many_times_takes_no_memory(tmp_path):
    # A dictionary of a thousand names for one array, and a thousand modules that are this dictionary.
    inner = {f"p{i:04}": ARRAY for i in range(1000)}
    content = pickle.dumps({f"m{i:04}": inner for i in range(1000)}, 4)
    tracemalloc.start()
    assert not attempt(tmp_path / "x", content, spare=2**25)
    tracemalloc.stop()


def test_the_canary_sings(tmp_path):
    def careless(path):
        with open(path, "rb") as file:
            pickle.load(file)

    tracemalloc.start()
    with pytest.raises(AssertionError, match=r"find_class"):
        attempt(tmp_path / "x", pickle.dumps({"m": {"w": Path("x")}}), careless)
    tracemalloc.stop()


def test_mutated_pickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hammer_pickles(tmp_path / "x", 7_000, seed=0)
    assert not (tmp_path / "canary_fuzz").exists()


def test_mutated_safetensors(tmp_path):
    loaded, refused = hammer(tmp_path / "x", tensors(), 2_000, seed=0)
    assert min(loaded, refused) > 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_mutated_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hammer_pickles(tmp_path / "x", 35_000, seed=1)
    hammer(tmp_path / "x", tensors(), 10_000, seed=1)
    assert not (tmp_path / "canary_fuzz").exists()


def hammer_keras(folder: str, count: int, seed: int) -> list[int]:
    """The same for the files of Keras; for a process of its own, which a fault in the HDF5 library would end."""
    contents = [path.read_bytes() for path in sorted(Path(folder).glob("y.*"))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = hammer(Path(folder) / "x", contents, count, seed)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return [*result, grown]


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
def test_mutated_keras_files(tmp_path, new_process, count):
    import h5py

    with h5py.File(tmp_path / "y.weights.h5", "w") as file:
        for container, name in (("dense", "head"), ("dense_1", "tail")):
            variables = file.create_group(f"layers/{container}/vars")
            variables.attrs["name"] = name
            variables["0"], variables["1"] = ARRAY, ARRAY[0]
    with zipfile.ZipFile(tmp_path / "y.keras", "w") as archive:
        archive.writestr("config.json", '{"config": {"metadata": {"a": 1}}}')
        archive.write(tmp_path / "y.weights.h5", "model.weights.h5")
    code = (
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('fuzz', file)\n"
        "fuzz = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(fuzz)\n"
        "report(fuzz.hammer_keras(folder, count, seed=0))"
    )
    loaded, refused, grown = new_process(code, file=__file__, folder=str(tmp_path), count=count)
    assert min(loaded, refused) > count // 20
    assert grown < 200_000
