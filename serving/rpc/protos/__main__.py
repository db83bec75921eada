"""Makes the Python modules of the definitions beside it; needs grpcio-tools (extra `dev`)."""

from __future__ import annotations

import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DEFINITIONS = ("jaxserve/v1/inference.proto", "open_inference_grpc.proto")

# Generated modules refuse every runtime but that of their own major version, though all they use
# has stood since protobuf 5: without this check they work with whatever the other packages need.
_CHECK = re.compile(
    r"^_runtime_version\.ValidateProtobufRuntimeVersion\(.*?^\)\n"
    r"|^from google\.protobuf import runtime_version as _runtime_version\n",
    re.MULTILINE | re.DOTALL,
)


def compile_into(folder: Path) -> bytes:
    """Returns the definitions as a serialised `FileDescriptorSet`; writes their modules."""
    protoc = import_module("grpc_tools.protoc")
    described = folder / "descriptors.binpb"
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={FOLDER}",
            f"--proto_path={Path(str(protoc.__file__)).parent / '_proto'}",
            f"--python_out={folder}",
            f"--pyi_out={folder}",
            f"--descriptor_set_out={described}",
            *DEFINITIONS,
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    return described.read_bytes()


def generate(into: Path = FOLDER) -> list[Path]:
    """Returns the modules it wrote: one of code and one of types for each definition."""
    written: list[Path] = []
    with tempfile.TemporaryDirectory() as name:
        compile_into(Path(name))
        for definition in DEFINITIONS:
            for suffix in ("_pb2.py", "_pb2.pyi"):
                source = Path(name, definition.removesuffix(".proto") + suffix)
                target = into / source.name
                target.write_text(_at_home(source.read_text()))
                written.append(target)
    return written


def _at_home(code: str) -> str:
    """Returns a generated module as one of this package, for any version of protobuf."""
    return (
        _CHECK.sub("", code)
        .replace("'jaxserve.v1.", "'jaxserve.serving.rpc.protos.")
        .replace(
            "'open_inference_grpc_pb2'", "'jaxserve.serving.rpc.protos.open_inference_grpc_pb2'"
        )
    )


if __name__ == "__main__":
    for path in generate():
        sys.stdout.write(f"{path.name}\n")
