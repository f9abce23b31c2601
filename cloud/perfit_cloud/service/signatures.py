"""Artefacts that are served only with a signature of the operator's.

The format is that of OpenSSF model signing (a sigstore bundle, model.sig, in the artefact's folder), with a
key pair and no transparency log, so that it is checked offline:

    python -m model_signing sign key --private_key KEY.pem --signature DIR/model.sig DIR

It covers every file of the folder: one that was added, removed or changed is refused. The check runs in a
process of its own: what the library brings (an HTTP client, a certificate store) has no place in a server.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from perfit_shared.errors import ConfigError, InvalidData

__all__ = ["SIGNATURE", "check_signature"]

SIGNATURE = "model.sig"
_SECONDS = 300.0  # hashing is fast, starting it takes seconds
_SHOWN = 300  # characters of what the library says


def check_signature(folder: Path, key: Path) -> None:
    """Raises InvalidData unless `folder` is as the holder of `key`'s private half signed it.

    `key`: a public key, PEM. Raises ConfigError where it cannot be checked.
    """
    if importlib.util.find_spec("model_signing") is None:
        raise ConfigError('artefact_key is set, but nothing can check it: pip install "perfit[signing]"')
    if not key.is_file():
        raise ConfigError(f"artefact_key: there is no file {key}")
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise InvalidData(f"{folder} has no {SIGNATURE}, and artefact_key wants one; it is not served")
    words = ["verify", "key", "--public_key", str(key), "--signature", str(signature), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *words],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        why = " ".join((done.stderr or done.stdout).split())[:_SHOWN]
        raise InvalidData(f"{folder} is not what was signed; it is not served ({why})")
