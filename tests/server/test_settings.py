"""Settings: flags over variables over defaults, a clear line for a wrong value, and one explanation for all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from prerope.rope.spec import RopeSpec, layer_numbers
from prerope.server.config import EngineConfig
from prerope.server.errors import ConfigurationError
from prerope.server.flags import allowed_text, environment_table, load_settings
from prerope.server.machine import places
from prerope.server.setting_types import read_key_file
from prerope.server.settings import Settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_defaults_serve_the_embedded_model_on_the_loopback_address() -> None:
    settings = load_settings([])
    assert (settings.model_id, settings.host, settings.port) == (None, "127.0.0.1", 8000)
    assert settings.rope_method == "auto"
    assert settings.api_keys == ()


def test_a_flag_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_MODEL_LEN", "1000")
    monkeypatch.setenv("PORT", "9000")
    settings = load_settings(["--max-model-len", "2000"])
    assert (settings.max_model_len, settings.port) == (2000, 9000)


@pytest.mark.parametrize("command", [None, "prerope serve"])
def test_help_and_complaints_name_the_command_that_was_typed(
    command: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    called = {} if command is None else {"command": command}
    shown = command or "python -m prerope.server"
    with pytest.raises(SystemExit):
        load_settings(["--help"], **called)
    assert capsys.readouterr().out.startswith(f"usage: {shown} [--flag value ...]")
    with pytest.raises(ConfigurationError, match=f"See {shown} --help"):
        load_settings(["--prt", "1"], **called)


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_MODEL_LEN", "")
    monkeypatch.setenv("ROPE_METHOD", "")
    settings = load_settings(["--model-id="])
    assert (settings.max_model_len, settings.rope_method, settings.model_id) == (None, "auto", None)


@pytest.mark.parametrize(("given", "groups"), [("8", (8,)), ("2-4-64", (2, 4, 64)), ("", None)])
def test_groups_of_several_shares(given: str, groups: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPE_GROUPS", given)
    assert load_settings([]).rope_spec().groups == groups
    monkeypatch.delenv("ROPE_GROUPS")
    assert load_settings([f"--rope-groups={given}"]).rope_spec().groups == groups
    for wrong in ("2,4", "2--4", "-2", "[2,4]", "two"):
        with pytest.raises(ConfigurationError, match=r"ROPE_GROUPS=.*powers of two between hyphens"):
            load_settings([f"--rope-groups={wrong}"])


def test_what_auto_is_in_some_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPE_LAYERS", "5-7+12=rerope:window=2048, 20=Streaming")
    layers = load_settings([]).rope_layers
    assert layers == {"5-7+12": RopeSpec(method="rerope", window=2048), "20": RopeSpec(method="streaming")}
    assert layer_numbers("5-7+12") == {5, 6, 7, 12}
    assert EngineConfig.of(load_settings([])).rope_layers == layers
    monkeypatch.setenv("ROPE_LAYERS", "")
    assert load_settings([]).rope_layers == {}
    wrong = (
        "5 =rerope 7-5=rerope 5-=rerope 5--7=rerope a=rerope 3=magic 3=auto 1-4=rerope,4=rope 3=rerope:x=1 0-99999=rope"
    )
    for text in (*wrong.split(), "3=rerope:select=64"):
        with pytest.raises(ConfigurationError, match=r"ROPE_LAYERS=.*LAYERS=METHOD between commas"):
            load_settings([f"--rope-layers={text}"])


@pytest.mark.parametrize(
    ("given", "num_bytes"), [("4GiB", 4 * 2**30), ("4GB", 4 * 10**9), ("4 gib", 4 * 2**30), ("5000000", 5_000_000)]
)
def test_sizes(given: str, num_bytes: int) -> None:
    assert load_settings(["--kv-cache-memory", given]).kv_cache_memory == num_bytes


@pytest.mark.parametrize(("flags", "value"), [([], False), (["--rope-logn"], True), (["--rope-logn=false"], False)])
def test_switches(flags: list[str], value: bool) -> None:
    assert load_settings(flags).rope_logn is value


def test_names_are_taken_in_any_case() -> None:
    settings = load_settings(["--rope-method", "YaRN", "--log-level", "INFO", "--device", "CUDA:1"])
    assert (settings.rope_method, settings.log_level, settings.device) == ("yarn", "info", "cuda:1")
    assert EngineConfig.of(load_settings(["--weight-quantization", "INT8"])).weight_quantization == "int8"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PORT", "99999", "0 to 65535"),
        ("PORT", "http", "0 to 65535"),
        ("MAX_MODEL_LEN", "0", "at least 1"),
        ("ROPE_METHOD", "magic", "dynamic_leaky"),
        ("ROPE_FACTOR", "0.5", "at least 1"),
        ("ROPE_FACTOR", "inf", "at least 1"),
        ("DTYPE", "int4", "auto, bfloat16, float16 or float32"),
        ("DEVICE", "tpu", "auto, cpu, cuda or cuda:N"),
        ("WEIGHT_QUANTIZATION", "int4", "none or int8"),
        ("KV_CACHE_MEMORY", "lots", "4GiB"),
        ("KV_CACHE_MEMORY", "1000", "at least 1MiB"),
        ("PREFIX_CACHING", "perhaps", "true or false"),
        ("REQUEST_TIMEOUT_S", "0", "above 0"),
        ("LOG_FORMAT", "xml", "text or json"),
    ],
)
@pytest.mark.parametrize("by_flag", [True, False])
def test_a_wrong_value_is_named_with_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str, by_flag: bool
) -> None:
    flags = []
    if by_flag:
        flags = [f"--{name.lower().replace('_', '-')}", value]
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings(flags)
    message = str(caught.value)
    assert f"{name}={value}" in message
    assert allowed in message
    assert "\n" not in message


def test_several_wrong_values_are_all_named() -> None:
    with pytest.raises(ConfigurationError, match=r"PORT=x.*DTYPE=y|DTYPE=y.*PORT=x"):
        load_settings(["--port", "x", "--dtype", "y"])


def test_a_flag_that_does_not_exist_is_named_with_the_one_meant() -> None:
    with pytest.raises(ConfigurationError, match="no flag --max-model-length; did you mean --max-model-len"):
        load_settings(["--max-model-length", "5"])
    with pytest.raises(ConfigurationError, match="unexpected argument 'serve'"):
        load_settings(["serve"])
    with pytest.raises(ConfigurationError, match="--port: expected one argument"):
        load_settings(["--port"])


def test_several_keys_and_none_of_them_is_ever_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "first-secret, second-secret,")
    settings = load_settings([])
    assert settings.api_keys == ("first-secret", "second-secret")
    assert "secret" not in repr(settings).replace("SecretStr", "").lower()
    with pytest.raises(ConfigurationError) as caught:
        load_settings(["--api-key", " ,"])
    assert "API_KEY is not allowed" in str(caught.value)


def test_every_setting_of_the_engine_reaches_it() -> None:
    values = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 77,
        "max_num_seqs": 3,
        "max_batched_tokens": 99,
        "stream_gap_s": 0.75,
        "kv_block_size": 8,
        "kv_cache_memory": 2**21,
        "gpu_memory_utilization": 0.75,
        "cuda_graphs": False,
        "cache_dir": Path("somewhere"),
        "weight_quantization": "int8",
        "rope_per_request": False,
        "kv_cache_dtype": "float16",
        "prefix_caching": False,
        "speculation": "off",
        "max_queued_requests": 5,
        "max_queued_tokens": 6,
        "request_timeout_s": 7.5,
        "cache_tier_dir": Path("elsewhere"),
        "cache_tier_size": 2**22,
        "cache_tier_memory": 2**23,
    }
    config = EngineConfig.of(Settings(**values))  # type: ignore[arg-type]
    assert config.block_size == values.pop("kv_block_size")
    assert config.tier_dir == values.pop("cache_tier_dir")
    assert (config.tier_bytes, config.tier_memory) == (values.pop("cache_tier_size"), values.pop("cache_tier_memory"))
    for name, value in values.items():
        assert getattr(config, name) == value, name
    assert config.on("cuda") == config


def test_limits_of_a_step_that_nobody_set_are_the_devices() -> None:
    """One that was set bounds the other: each sequence takes a token of a step."""

    def limits(device: str, **values: int) -> tuple[int, int]:
        config = EngineConfig.of(Settings(**values)).on(device)  # type: ignore[arg-type]
        return config.max_num_seqs, config.max_batched_tokens

    assert (limits("cpu"), limits("cuda"), limits("xpu")) == ((64, 512), (256, 2048), (64, 512))
    assert limits("cuda", max_batched_tokens=100) == (100, 100)
    assert limits("cuda", max_num_seqs=4000) == (4000, 4000)
    assert limits("cpu", max_num_seqs=3, max_batched_tokens=99) == (3, 99)


def test_every_rope_variable_reaches_the_spec() -> None:
    values = {"method": "leaky_rerope", "factor": 4.0, "window": 64, "leak": 8.0, "group": 2, "logn": True}
    values["train_length"] = 128
    settings = Settings(**{f"rope_{name}": value for name, value in values.items()})  # type: ignore[arg-type]
    spec = EngineConfig.of(settings).rope
    assert {name: getattr(spec, name) for name in values} == values


def test_help_shows_default_range_and_meaning_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert "--" + name.replace("_", "-") in shown
        assert field.description
        assert " ".join(field.description.split()) in shown.replace("- ", "-") or field.description in shown
    assert "default: 8000; integer, 0 to 65535" in shown


def test_the_table_explains_every_setting() -> None:
    table = environment_table()
    for name, field in Settings.model_fields.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name.upper()}` "))
        assert allowed_text(field) in row
        assert row.count("|") == 5, "a | inside a cell breaks the table"


def test_no_name_is_one_that_kubernetes_injects() -> None:
    injected = re.compile(r".+_(PORT|SERVICE_HOST|SERVICE_PORT.*|PORT_\d+.*)")
    assert not [name for name in Settings.model_fields if injected.fullmatch(name.upper())]


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_settings([]).cache_dir == tmp_path / "prerope"
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "own"))
    assert load_settings([]).cache_dir == tmp_path / "own"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings(["--cache-dir", "~/own"]).cache_dir == tmp_path / "own"


def test_without_a_home_the_cache_is_a_temporary_folder_of_this_user_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels are loaded from it: one that others may write, or a link, is not taken."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    usual = tmp_path / f"prerope-{os.getuid()}"
    assert places.temporary_folder.__wrapped__() == usual
    assert usual.stat().st_mode & 0o777 == 0o700
    assert places.temporary_folder.__wrapped__() == usual
    usual.chmod(0o777)
    other = places.temporary_folder.__wrapped__()
    assert other != usual
    assert other.stat().st_mode & 0o777 == 0o700
    usual.rmdir()
    usual.symlink_to(other)
    assert places.temporary_folder.__wrapped__() not in (usual, other)


def test_a_byte_order_mark_is_not_part_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n", encoding="utf-8-sig")
    assert read_key_file(file) == ("first", "second")
