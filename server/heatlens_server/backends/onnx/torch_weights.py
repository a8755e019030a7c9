"""Weights from files of torch.save's, without PyTorch: tensors only, as numpy arrays.

A file holds a pickle, which is a program, and the tensors' storages beside it. Python's own unpickler calls what a
pickle names and believes its lengths. This one knows the few instructions that write dictionaries of tensors, calls
nothing that a file names, and takes little more memory than the file's size.

The formats are those of torch/serialization.py: a zip archive, or since before torch 1.6 five pickles in a row, then
each storage as its length and its bytes.
"""

import hashlib
import io
import math
import mmap
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.core.errors import ModelLoadError

Array = npt.NDArray[Any]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LENGTH_BYTES = 8
_MOST_DIMENSIONS = 32
_MOST_INSTRUCTIONS = 1_000_000
"""Of one pickle: a byte can make an object. An entry of a state_dict takes about 30."""

_BFLOAT16 = "BFloat16Storage"
_DTYPES: Mapping[str, str] = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    _BFLOAT16: "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
    "ComplexFloatStorage": "<c8",
    "ComplexDoubleStorage": "<c16",
}
"""How numpy calls the elements of torch's storages."""

_DICTIONARY = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_NAMES = frozenset({_DICTIONARY, _TENSOR, _PARAMETER, *(f"torch {name}" for name in _DTYPES)})
"""What pickles may name."""

_PUSHED = frozenset({"BINFLOAT", "BININT", "BININT1", "BININT2", "BINUNICODE", "LONG1"})
_CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES: Mapping[str, int] = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class _Name:
    """What a pickle names: one of `_NAMES`."""

    text: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """The elements of one or more tensors, of which the bytes lie elsewhere in the file."""

    key: str
    kind: str
    count: int

    @property
    def size_bytes(self) -> int:
        return self.count * np.dtype(_DTYPES[self.kind]).itemsize


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_weights(path: Path) -> dict[str, Array]:
    """Read a file that holds one dictionary of tensors, such as a state_dict.

    Args:
        path: of the file, of either of torch.save's formats.

    Returns:
        Arrays by name, in the file's order, with torch's shapes and types; bfloat16 as float32, which holds it exactly.
        Tensors of one storage share memory.

    Raises:
        ModelLoadError: it cannot be read, or holds anything else.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            storages: dict[str, _Storage] = {}
            read = _from_zip if zipfile.is_zipfile(file) else _from_pickles
            content, arrays = read(file, data, storages)
        return _views(content, arrays)
    except OSError as error:
        raise ModelLoadError(f"weights file {path.name!r} cannot be read ({type(error).__name__})") from error
    # What parses a file that is wrong raises whatever it meets.
    except Exception as error:
        why = error if isinstance(error, ValueError) else type(error).__name__
        raise ModelLoadError(f"weights file {path.name!r} cannot be read as plain tensors: {why}") from error


def weights_version(weights: Mapping[str, Array]) -> str:
    """The first 12 hex digits of a SHA-256 over weights, the same that torch's sources tell of the same weights."""
    digest = hashlib.sha256()
    for name, array in sorted(weights.items()):
        digest.update(f"{name} torch.{array.dtype} {array.shape}\n".encode())
        digest.update(np.asarray(array, order="C").data)
    return digest.hexdigest()[:12]


def _from_pickles(
    file: io.BufferedReader, data: mmap.mmap, storages: dict[str, _Storage]
) -> tuple[object, Mapping[str, Array]]:
    magic, protocol = _run(data, storages), _run(data, storages)
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise ValueError("it is no file of torch.save's")
    match _run(data, storages):
        case {"little_endian": True}:
            pass
        case _:
            raise ValueError("its bytes are in another order")
    content, keys = _run(data, storages), _run(data, storages)
    if not isinstance(keys, list):
        raise ValueError("it does not list its storages")  # noqa: TRY004 - of the file, not of a caller
    arrays = {}
    # Pages of the map that are read count as memory, beside what they are copied to.
    file.seek(data.tell())
    for key in map(_text, keys):
        storage = storages[key]
        count = int.from_bytes(file.read(_LENGTH_BYTES), "little", signed=True)
        if count != storage.count or file.tell() + storage.size_bytes > len(data):
            raise ValueError(f"storage {key!r} is not as long as it says")
        arrays[key] = _elements(storage, file.read(storage.size_bytes))
    return content, arrays


def _from_zip(
    file: io.BufferedReader, data: mmap.mmap, storages: dict[str, _Storage]
) -> tuple[object, dict[str, Array]]:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is no file of torch.save's")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and _member(archive, f"{root}byteorder") != b"little":
            raise ValueError("its bytes are in another order")
        content = _run(io.BytesIO(_member(archive, pickles[0])), storages)
        # Members may lie over each other.
        if sum(storage.size_bytes for storage in storages.values()) > len(data):
            raise ValueError("its storages are longer than the file")
        arrays = {}
        for key, storage in storages.items():
            stored = _member(archive, f"{root}data/{key}")
            if len(stored) != storage.size_bytes:
                raise ValueError(f"storage {key!r} is not as long as it says")
            arrays[key] = _elements(storage, stored)
        return content, arrays


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    # What is compressed may be of any length.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name!r} in it is compressed")
    return archive.read(name)


def _elements(storage: _Storage, stored: bytes) -> Array:
    elements: Array = np.frombuffer(stored, _DTYPES[storage.kind])
    if storage.kind == _BFLOAT16:
        elements = (elements.astype("<u4") << 16).view("<f4")
    return elements


def _views(content: object, arrays: Mapping[str, Array]) -> dict[str, Array]:
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary")  # noqa: TRY004 - of the file, not of a caller
    views = {}
    for name, tensor in content.items():
        if not isinstance(tensor, _Tensor):
            raise ValueError(f"entry {name!r} is no tensor")  # noqa: TRY004
        elements = arrays[tensor.storage.key][tensor.offset :]
        strides = [step * elements.itemsize for step in tensor.strides]
        views[name] = np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)
    return views


def _run(  # noqa: PLR0912, PLR0915 - one branch per instruction
    data: io.BytesIO | mmap.mmap, storages: dict[str, _Storage]
) -> object:
    """Run the pickle that begins here; the storages that it names are put into `storages`.

    Raises:
        ValueError: an instruction or a name is not known, or a tensor does not lie in its storage.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memory: dict[Any, object] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    # mmap reads as files do.
    for count, (instruction, argument, _place) in enumerate(pickletools.genops(data)):  # type: ignore[arg-type]
        if count >= _MOST_INSTRUCTIONS:
            raise ValueError("it has too many instructions")
        match instruction.name:
            case "PROTO" | "STOP":
                continue
            case name if name in _PUSHED:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "APPEND":
                stack[-2].append(stack.pop())
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][_text(key)] = value
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(map(_text, items[::2]), items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memory[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memory[argument])
            case "GLOBAL":
                if argument not in _NAMES:
                    raise ValueError(f"it names {str(argument).replace(' ', '.')}, which is not part of plain tensors")
                stack.append(_Name(argument))
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"storage {storage.key!r} is of two kinds")
                stack.append(storage)
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_made(called, arguments))
            case "BUILD":
                # Versions of a state_dict's modules, as an attribute of the dictionary.
                stack.pop()
            case name:
                raise ValueError(f"its instruction {name} is not one of plain tensors")
    (content,) = stack
    return content


def _text(key: object) -> str:
    # The hash of nested tuples takes time without end.
    if type(key) is not str:
        raise ValueError("a name in it is no text")
    return key


def _storage(identity: object) -> _Storage:
    match identity:
        case ("storage", _Name(text=name), str(key), str(), int(count), *view) if view in ([], [None]) and count >= 0:
            kind = name.removeprefix("torch ")
            if kind in _DTYPES:
                return _Storage(key, kind, count)
    raise ValueError("a storage in it is none of torch.save's")


def _made(called: object, arguments: object) -> object:
    match called, arguments:
        case _Name(text=name), () if name == _DICTIONARY:
            return {}
        case _Name(text=name), (_Tensor() as tensor, *_) if name == _PARAMETER:
            return tensor
        case (
            _Name(text=name),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
        ) if name == _TENSOR:
            return _checked(_Tensor(storage, offset, shape, strides))
    raise ValueError("it calls what is not part of plain tensors")


def _checked(tensor: _Tensor) -> _Tensor:
    """Check that a tensor lies in its storage, each element at a place of its own.

    Raises:
        ValueError: it does not.
    """
    lengths, steps = tensor.shape, tensor.strides
    if len(lengths) != len(steps) or len(lengths) > _MOST_DIMENSIONS:
        raise ValueError("a tensor has other strides than dimensions")
    if not all(type(number) is int and number >= 0 for number in (tensor.offset, *lengths, *steps)):
        raise ValueError("a tensor has a negative offset, length or stride")
    reach = 0
    for step, length in sorted(zip(steps, lengths, strict=True)):
        if length > 1 and step <= reach:
            raise ValueError("elements of a tensor overlap")
        reach += max(length - 1, 0) * step
    if math.prod(lengths) > 0 and tensor.offset + reach >= tensor.storage.count:
        raise ValueError(f"a tensor reaches out of its storage {tensor.storage.key!r}")
    return tensor
