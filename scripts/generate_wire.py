"""Generate shared/perfit_shared/wire from protos/: `python scripts/generate_wire.py [--out DIR]`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIRE = ROOT / "shared" / "perfit_shared" / "wire"


def generate(out: Path) -> None:
    """Write the stubs of every proto into `out`, importing each other from perfit_shared.wire."""
    from grpc_tools import protoc

    source = ROOT / "protos"
    for proto in sorted((source / "perfit" / "v1").glob("*.proto")):
        code = protoc.main(
            [
                "protoc",
                f"-I{source / 'perfit' / 'v1'}",
                f"--python_out={out}",
                f"--pyi_out={out}",
                f"--grpc_python_out={out}",
                proto.name,
            ]
        )
        if code:
            sys.exit(f"protoc failed on {proto.name}")
    for path in out.glob("*_pb2*.py*"):
        text = re.sub(
            r"^import (\w+_pb2) as", r"from perfit_shared.wire import \1 as", path.read_text(), flags=re.M
        )
        path.write_text(text)
    (out / "__init__.py").write_text(
        '"""Generated from protos/ by scripts/generate_wire.py; never edited."""\n'
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WIRE)
    generate(parser.parse_args().out)
