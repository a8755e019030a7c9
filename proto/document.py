"""Write docs/proto.md from the protos' comments: `python proto/document.py OUT`, in the environment of the stubs."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "proto" / "heatlens" / "v1").glob("*.proto"))
PACKAGE = "heatlens.v1"

# Field numbers of descriptor.proto, of which paths to comments are made.
_MESSAGE, _ENUM, _SERVICE, _PART = 4, 5, 6, 2

_INTRODUCTION = f"""# The wire contract

What the protos in [proto/heatlens/v1](../proto/heatlens/v1/explain.proto) say, package `{PACKAGE}`.
`make proto` writes this page from their comments.
Fields and enum values are only added.
How errors are told: [client.md](client.md#errors). Programs in other languages: [client.md](client.md#without-the-sdk).
"""


def parse() -> Iterator[FileDescriptorProto]:
    """The protos, comments included."""
    with tempfile.NamedTemporaryFile() as file:
        arguments = [f"-I{ROOT / 'proto'}", f"-I{ROOT / 'third_party'}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
        options = ["--include_source_info", f"--descriptor_set_out={file.name}"]
        if protoc.main(["protoc", *arguments, *options, *map(str, FILES)]) != 0:
            sys.exit(1)
        yield from FileDescriptorSet.FromString(Path(file.name).read_bytes()).file


class Comments:
    """The comments of a file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._by_path = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}

    def at(self, *path: int) -> str:
        """The paragraphs of a comment."""
        paragraphs = self._by_path.get(path, "").strip().split("\n\n")
        return "\n\n".join(" ".join(line.strip() for line in one.splitlines()) for one in paragraphs)

    def in_cell(self, *path: int) -> str:
        """The same as one line of a table."""
        return self.at(*path).replace("\n\n", " ").replace("|", "\\|")


def document(file: FileDescriptorProto) -> Iterator[str]:
    """The page's part about a file: services, messages, enumerations, as they come in it."""
    comments = Comments(file)
    for n, service in enumerate(file.service):
        yield from _service(service, comments, (_SERVICE, n))
    for n, message in enumerate(file.message_type):
        yield from _message(message, comments, (_MESSAGE, n))
    for n, enumeration in enumerate(file.enum_type):
        yield from _enum(enumeration, comments, (_ENUM, n))


def _service(service: ServiceDescriptorProto, comments: Comments, path: Sequence[int]) -> Iterator[str]:
    yield f"## {service.name}\n\n{comments.at(*path)}\n"
    for n, method in enumerate(service.method):
        asked, answered = (_link(name) for name in (method.input_type, method.output_type))
        asked, answered = (
            "stream of " * method.client_streaming + asked,
            "stream of " * method.server_streaming + answered,
        )
        yield f"### {service.name}/{method.name}\n\n{asked} → {answered}\n\n{comments.at(*path, _PART, n)}\n"


def _message(message: DescriptorProto, comments: Comments, path: Sequence[int]) -> Iterator[str]:
    yield f"## {message.name}\n\n{comments.at(*path)}\n"
    if message.field:
        yield "| field | type | number | |\n|---|---|---|---|"
        for n, field in enumerate(message.field):
            # One field of a oneof is set; an optional field is alone in its own.
            choice = field.HasField("oneof_index") and not field.proto3_optional
            of = f"one of `{message.oneof_decl[field.oneof_index].name}`: " if choice else ""
            yield f"| `{field.name}` | {_type(field)} | {field.number} | {of}{comments.in_cell(*path, _PART, n)} |"
        yield ""


def _enum(enumeration: EnumDescriptorProto, comments: Comments, path: Sequence[int]) -> Iterator[str]:
    yield f"## {enumeration.name}\n\n{comments.at(*path)}\n\n| value | number | |\n|---|---|---|"
    for n, value in enumerate(enumeration.value):
        yield f"| `{value.name}` | {value.number} | {comments.in_cell(*path, _PART, n)} |"
    yield ""


def _type(field: FieldDescriptorProto) -> str:
    name = _link(field.type_name) if field.type_name else field.Type.Name(field.type).removeprefix("TYPE_").lower()
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return "repeated " * repeated + "optional " * field.proto3_optional + name


def _link(name: str) -> str:
    short = name.removeprefix(f".{PACKAGE}.")
    return f"`{name.removeprefix('.')}`" if short == name else f"[{short}](#{short.lower()})"


if __name__ == "__main__":
    # Services first.
    files = sorted(parse(), key=lambda file: not file.service)
    lines = [line for file in files for line in document(file)]
    Path(sys.argv[1]).write_text("\n".join([_INTRODUCTION, *lines]), encoding="utf-8")
