"""The cloud's configuration: file under environment under flags, and everything that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfit_cloud.config import CloudConfig, load_config, parse_address, parse_addresses, parse_duration
from perfit_shared.errors import ConfigError


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text(
        'model = "a"\nartefacts = ["x", "y"]\nnew_tokens = 1\nexamples = 2\ninvite_seconds = "2h"\n'
    )
    environment = {
        "PERFIT_CLOUD_CONFIG": str(file),
        "PERFIT_CLOUD_NEW_TOKENS": "3",
        "PERFIT_CLOUD_CALLS": "4",
    }
    environment |= {"PERFIT_CLOUD_NAMES": "a.example, b.example", "PATH": "/bin"}
    config = load_config(environment=environment, flags={"calls": "5", "model": None, "state": tmp_path})
    assert (config.model, config.artefacts, config.names) == ("a", ("x", "y"), ("a.example", "b.example"))
    assert (config.new_tokens, config.examples, config.calls) == (3, 2, 5)
    assert (config.invite_seconds, config.state) == (7200, tmp_path)


def test_unknown_keys_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text('modle = "a"\n')
    with pytest.raises(ConfigError, match=r"cloud.toml: no setting \"modle\""):
        load_config(file=file, environment={})
    with pytest.raises(ConfigError, match="PERFIT_CLOUD_MODLE"):
        load_config(environment={"PERFIT_CLOUD_MODLE": "a"})
    with pytest.raises(ConfigError, match="modle"):
        load_config(environment={}, flags={"modle": "a"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calls", 0),
        ("calls", -1),
        ("calls", "many"),
        ("calls", True),
        ("calls", 1.5),
        ("model", 3),
        ("artefacts", 3),
        ("artefacts", [1]),
        ("address", "nowhere"),
        ("address", "host:99999"),
        ("address", "::1:80"),
        ("address", "0.0.0.0:80"),
        ("enrol_address", "[::]:80"),
        ("public_address", "host:0"),
        ("public_address", "0.0.0.0:80"),
        ("invite_seconds", 0),
        ("invite_seconds", "1y"),
        ("invite_seconds", ""),
        ("certificate_seconds", "400d"),
        ("dtype", "float64"),
        ("tensor_parallel", 0),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(environment={}, flags={key: value})


def test_every_key_is_read_by_its_type_and_zero_only_where_it_means_something() -> None:
    config = CloudConfig(threads="0", state="~/x", names=["a", " "], drain_seconds="2m", calls=2**40)  # type: ignore[arg-type]
    assert (config.threads, config.state, config.names) == (0, Path("~/x").expanduser(), ("a",))
    assert (config.drain_seconds, config.calls) == (120, 2**40)
    for key, value in (("threads", -1), ("memory_bytes", 2**40 + 1), ("keep_bytes", -1), ("state", 3)):
        with pytest.raises(ConfigError, match=key):
            load_config(environment={}, flags={key: value})


def test_our_own_engine_has_no_worker_processes() -> None:
    assert CloudConfig(engine="vllm", tensor_parallel=2).tensor_parallel == 2
    with pytest.raises(ConfigError, match="tensor_parallel is vLLM's"):
        CloudConfig(engine="own", tensor_parallel=2)


def test_float16_is_refused_with_the_reason() -> None:
    for dtype in ("auto", "float32", "bfloat16"):
        CloudConfig(dtype=dtype)
    # A legal shift overflowed it, and the answer of another device in the batch became NaN.
    with pytest.raises(ConfigError, match=r"dtype float16 cannot be served: .* overflow"):
        CloudConfig(dtype="float16")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_config(file=tmp_path / "none.toml", environment={})
    (tmp_path / "bad.toml").write_text("model = ")
    with pytest.raises(ConfigError, match=r"bad.toml is not TOML"):
        load_config(file=tmp_path / "bad.toml", environment={})


def test_every_interface_needs_a_public_address() -> None:
    config = CloudConfig(address="0.0.0.0:80", public_address="cloud.example:80")
    assert config.public_address == "cloud.example:80"


def test_addresses_and_durations() -> None:
    assert parse_address("[::1]:80") == ("::1", 80)
    assert parse_address("host:0") == ("host", 0)
    assert [parse_duration(text) for text in ("90", "90s", "15m", "24h", "7d")] == [
        90,
        90,
        900,
        86400,
        604800,
    ]


def test_devices_may_be_given_several_addresses() -> None:
    config = CloudConfig(public_address="a.example:7443, b.example:7443", public_enrol_address="[::1]:7444")
    assert parse_addresses(config.public_address) == [("a.example", 7443), ("b.example", 7443)]
    for wrong in ("a.example:7443,", "a.example:7443,0.0.0.0:7443", "a.example:7443 b.example:7443", "a:0"):
        with pytest.raises(ConfigError, match="public_address"):
            CloudConfig(public_address=wrong)
