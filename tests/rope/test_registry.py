"""Names, refusals and identities of methods: what is refused says what is allowed, and digests tell K and V apart."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from prerope.rope.frequencies import Rotary
from prerope.rope.methods import canonical_name, method_table, resolve
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.reading import MethodError, PositionMethod
from prerope.rope.registry import METHODS
from prerope.rope.spec import ALIASES, METHOD_NAMES, RopeSpec

from tests.rope.published import longrope_trained, trained

WINDOWED = [name for name, entry in METHODS.items() if entry.windowed and name != "streaming"]
DEFAULT_WINDOW = {"string": 341}


def test_every_name_has_an_entry_and_every_entry_a_name() -> None:
    assert set(METHODS) | {"auto", "model"} == set(METHOD_NAMES)
    assert [entry.name for entry in method_table()] == [name for name in METHOD_NAMES if name not in ("auto", "model")]
    assert len(set(METHOD_NAMES)) == len(METHOD_NAMES)
    for entry in method_table():
        assert entry.summary, entry.name
        assert entry.source, entry.name


def test_the_names_that_were_asked_for() -> None:
    asked = "rope linear dynamic_linear ntk ntk_fixed ntk_mixed dynamic_ntk yarn dynamic_yarn longrope llama3 rerope"
    asked += " leaky_rerope jagged_rerope dynamic_leaky self_extend dual_chunk streaming xpos proportional ntk_by_parts"
    assert {*asked.split(), "model", "auto"} <= set(METHOD_NAMES)
    assert ALIASES["offset"] == "rope"
    for alias, name in ALIASES.items():
        assert canonical_name(alias) == name
        assert name in METHOD_NAMES
        assert alias not in METHOD_NAMES


@pytest.mark.parametrize("name", [entry.name for entry in method_table() if entry.name != "proportional"])
def test_parameters_are_json_and_name_every_given_field(name: str) -> None:
    given = {"factor": 6.0, "window": 9, "leak": 3.0, "group": 5, "groups": [8, 2, 4], "sinks": 2}
    takes = {field: given[field] for field in METHODS[name].takes}
    method = resolve(RopeSpec(method=name, **takes), longrope_trained() if name == "longrope" else trained())
    parameters = json.loads(json.dumps(method.parameters))
    assert {field: parameters[field] for field in takes} == takes


def test_an_unknown_method_is_refused_with_the_alternatives() -> None:
    with pytest.raises(MethodError, match=r"'rotary'.*choose one of auto, model, rope.*dynamic_leaky"):
        resolve(RopeSpec(method="rotary"), trained())


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("window", [0, -1, 1024, 5000])
def test_a_window_outside_its_limits(name: str, window: int) -> None:
    with pytest.raises(MethodError, match=rf"ROPE_WINDOW\) is {window}.*between 1 and 1023.*256 to 512"):
        resolve(RopeSpec(method=name, window=window), trained(length=1024))


@pytest.mark.parametrize("name", WINDOWED)
def test_a_wide_window_is_warned_about(name: str) -> None:
    warning = resolve(RopeSpec(method=name, window=513), trained(length=1024)).rule.warning
    assert warning is not None
    assert all(part in warning for part in ("ROPE_WINDOW", "513", "1024", "256 to 512"))
    assert resolve(RopeSpec(method=name, window=512), trained(length=1024)).rule.warning is None
    assert resolve(RopeSpec(method=name), trained(length=1024)).parameters["window"] == DEFAULT_WINDOW.get(name, 256)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RopeSpec(method="linear", factor=0.5), r"ROPE_FACTOR\) is 0.5.*between 1 and"),
        (RopeSpec(method="ntk", factor=1e9), r"ROPE_FACTOR\) is 1000000000.0.*between 1 and"),
        (RopeSpec(method="linear", factor=float("nan")), r"ROPE_FACTOR\) is nan"),
        (RopeSpec(method="leaky_rerope", leak=0.5), r"ROPE_LEAK\) is 0.5.*at least 1"),
        (RopeSpec(method="leaky_rerope", leak=float("nan")), r"ROPE_LEAK\) is nan"),
        (RopeSpec(method="self_extend", group=0), r"ROPE_GROUP\) is 0.*at least 1"),
        # Searched for without end, this would hang whoever resolves a request's method.
        (RopeSpec(method="self_extend", window=1023, factor=1e6), r"no group up to 65536.*1024.*ROPE_WINDOW\) of 1023"),
        (RopeSpec(method="rope", train_length=1), r"ROPE_TRAIN_LENGTH\) is 1.*at least 2"),
        (RopeSpec(method="longrope"), r"long_factor.*yarn or dynamic_leaky"),
        (RopeSpec(method="proportional"), r"property of the trained model.*'default'.*use model"),
    ],
)
def test_refusals_name_the_value_and_the_limit(spec: RopeSpec, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        resolve(spec, trained())


def test_a_window_cannot_lie_over_frequencies_that_depend_on_the_length() -> None:
    with pytest.raises(MethodError, match="rerope cannot be laid over the model's own longrope frequencies"):
        resolve(RopeSpec(method="rerope"), longrope_trained())


def test_an_unknown_rope_type_is_refused_by_name() -> None:
    rotary = Rotary(64, 64, 1e4, "spiral", 1024, 1024, {})
    with pytest.raises(MethodError, match=r"'spiral'.*default, linear, dynamic, yarn"):
        resolve(RopeSpec(method="model"), rotary)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            RopeSpec(method="streaming", window=1021),
            r"ROPE_WINDOW\) is 1021.*4 sinks \(ROPE_SINKS\).*between 1 and 1020",
        ),
        (RopeSpec(method="streaming", window=0), r"ROPE_WINDOW\) is 0"),
        (RopeSpec(method="streaming", sinks=1024), r"ROPE_SINKS\) is 1024.*between 0 and 1023"),
        (RopeSpec(method="jagged_rerope", window=1000, group=25), r"ROPE_GROUP\) is 25.*at most 24"),
        (RopeSpec(method="dpe", groups=(2, 6)), r"ROPE_GROUPS\) have 6.*power of two, 1 to 65536"),
        (RopeSpec(method="dpe", groups=(0,)), r"ROPE_GROUPS\) have 0"),
        (RopeSpec(method="dpe", groups=(-2,)), r"ROPE_GROUPS\) have -2"),
        (RopeSpec(method="dpe", groups=(2**17,)), r"ROPE_GROUPS\) have 131072"),
        (RopeSpec(method="dpe", groups=(2,) * 33), r"ROPE_GROUPS\) are 33.*1 to 32"),
        (RopeSpec(method="dpe", groups=()), r"ROPE_GROUPS\) are 0.*1 to 32"),
        (RopeSpec(method="dpe", window=1023, factor=1e6), r"dpe: no group up to 65536"),
        (RopeSpec(method="jagged_rerope", group=0), r"ROPE_GROUP\) is 0.*at least 1"),
    ],
)
def test_parameters_of_one_method(spec: RopeSpec, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        resolve(spec, trained(length=1024))


def test_streaming_takes_all_of_the_trained_length() -> None:
    assert method("streaming").parameters == {"window": 1020, "sinks": 4}
    assert method("streaming", sinks=0).parameters == {"window": 1024, "sinks": 0}
    assert method("streaming").rule.warning is None


def test_auto() -> None:
    assert resolve(RopeSpec(method="auto"), trained()).name == "dynamic_leaky"
    assert resolve(RopeSpec(method="auto"), longrope_trained()).name == "longrope"


def test_the_default_scale_is_the_target_over_the_trained_length() -> None:
    assert resolve(RopeSpec(method="linear"), trained(length=1024), 8192).parameters["factor"] == 8.0
    assert resolve(RopeSpec(method="linear"), trained(length=1024), 512).parameters["factor"] == 1.0
    assert resolve(RopeSpec(method="linear", factor=3.0), trained(length=1024), 8192).parameters["factor"] == 3.0


# --- digests ----------------------------------------------------------------------------------------------------------


def method(name: str, **spec: object) -> PositionMethod:
    return resolve(RopeSpec(method=name, **spec), trained())  # type: ignore[arg-type]


DISTINCT: dict[str, PositionMethod] = {
    "rope": method("rope"),
    "rope+logn": method("rope", logn=True),
    "rope+logn, another L": method("rope", logn=True, train_length=512),
    "linear 2": method("linear", factor=2.0),
    "linear 4": method("linear", factor=4.0),
    "dynamic_linear": method("dynamic_linear"),
    "dynamic_linear, another L": method("dynamic_linear", train_length=512),
    "ntk": method("ntk", factor=4.0),
    "ntk_fixed": method("ntk_fixed", factor=4.0),
    "ntk_mixed": method("ntk_mixed", factor=4.0),
    "dynamic_ntk": method("dynamic_ntk"),
    "dynamic_ntk 3": method("dynamic_ntk", factor=3.0),
    "yarn": method("yarn", factor=4.0),
    "dynamic_yarn": method("dynamic_yarn"),
    "llama3": method("llama3", factor=4.0),
    "rerope 256": method("rerope", window=256),
    "rerope 257": method("rerope", window=257),
    "rerope 256+logn": method("rerope", window=256, logn=True),
    "leaky 256 8": method("leaky_rerope", window=256, leak=8.0),
    "leaky 256 9": method("leaky_rerope", window=256, leak=9.0),
    "self_extend 256 4": method("self_extend", window=256, group=4),
    "self_extend 256 5": method("self_extend", window=256, group=5),
    "dpe 256 4": method("dpe", window=256, groups=(4,)),
    "dpe 256 4 8": method("dpe", window=256, groups=(4, 8)),
    "dpe 256 8 4": method("dpe", window=256, groups=(8, 4)),
    "dpe 300 4 8": method("dpe", window=300, groups=(4, 8)),
    "xpos": method("xpos"),
    "ntk_by_parts": method("ntk_by_parts", factor=4.0),
    "jagged 256 32": method("jagged_rerope", window=256, group=32),
    "jagged 256 64": method("jagged_rerope", window=256, group=64),
    "dual_chunk 256": method("dual_chunk", window=256),
    "dual_chunk 300": method("dual_chunk", window=300),
    "streaming 256": method("streaming", window=256),
    "streaming 300": method("streaming", window=300),
    "streaming 256 8": method("streaming", window=256, sinks=8),
    "string 256": method("string", window=256),
    "string 300": method("string", window=300),
    "dynamic_leaky 256": method("dynamic_leaky", window=256),
    "dynamic_leaky 300": method("dynamic_leaky", window=300),
    "dynamic_rerope 256": method("dynamic_rerope", window=256),
    "dynamic_rerope 300": method("dynamic_rerope", window=300),
    "another base": resolve(RopeSpec(method="rope"), trained(base=20000.0)),
    "rerope, another base": resolve(RopeSpec(method="rerope"), trained(base=20000.0)),
}
EQUAL = [
    (method("rope"), method("offset")),
    (method("rope"), method("model")),
    (method("rope"), method("linear", factor=1.0)),
    (method("rope"), method("rope", train_length=512)),  # L plays no part in plain rope
    (method("linear", factor=4.0), method("pi", factor=4.0)),
    (method("leaky_rerope"), method("leaky")),
    (method("dynamic_leaky"), method("auto")),
    (method("dpe", groups=(4, 8)), method("dpe", groups=(4, 4, 8, 8))),  # the same groups for the same pairs
    (method("rerope"), method("rerope", window=256)),  # the default, written out
]


def test_different_readings_have_different_digests() -> None:
    for (one, first), (other, second) in combinations(DISTINCT.items(), 2):
        assert first.digest() != second.digest(), f"{one} and {other}"
        assert positions(first).digest != positions(second).digest


@pytest.mark.parametrize("pair", EQUAL, ids=lambda pair: f"{pair[0].name}-{pair[1].name}")
def test_equal_readings_have_equal_digests(pair: tuple[PositionMethod, PositionMethod]) -> None:
    assert pair[0].digest() == pair[1].digest()


def test_a_digest_is_the_same_in_every_process() -> None:
    """It seeds hashes that may outlive the process: no id() and no hash() may be in it."""
    assert method("rope").digest() == resolve(RopeSpec(method="rope"), trained()).digest()
    assert positions(method("dynamic_ntk")).digest == positions(method("dynamic_ntk")).digest


def positions(resolved: PositionMethod) -> ModelPositions:
    return ModelPositions({"": resolved}, "")


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        (RopeSpec(method="rerope", window=200), 200),
        (RopeSpec(method="leaky_rerope", window=200), 200),
        (RopeSpec(method="self_extend", window=200, group=4), 200),
        (RopeSpec(method="dpe", window=200, groups=(4, 1)), 200),
        (RopeSpec(method="jagged_rerope", window=200, group=16), 215),
        (RopeSpec(method="dual_chunk", window=200), 824),
        (RopeSpec(method="streaming", window=200, sinks=4), 204),
        (RopeSpec(method="string", window=200), 200),
        (RopeSpec(method="dynamic_leaky", window=200), 1024),
        (RopeSpec(method="dynamic_rerope", window=200), 1024),
        (RopeSpec(method="dynamic_ntk"), 1024),
        (RopeSpec(method="dynamic_linear"), 1024),
        (RopeSpec(method="dynamic_yarn"), 1024),
        (RopeSpec(method="dynamic_ntk", train_length=512), 512),
        (RopeSpec(method="rope", logn=True), 1024),
        (RopeSpec(method="rerope", window=200, logn=True), 200),
    ],
)
def test_rows_that_are_ropes(spec: RopeSpec, rows: int) -> None:
    resolved = resolve_model(spec, {"": trained()}, None)
    plain = resolve_model(RopeSpec(method="rope"), {"": trained()}, None)
    assert resolved.plain_rows == rows
    assert resolved.block_seed(rows) == plain.block_seed(rows) == plain.block_seed(rows + 1)
    assert resolved.block_seed(rows + 1) != plain.block_seed(rows + 1)


@pytest.mark.parametrize("name", ["linear", "ntk", "ntk_fixed", "ntk_mixed", "ntk_by_parts", "yarn", "llama3", "xpos"])
def test_static_frequencies_share_nothing_with_rope(name: str) -> None:
    resolved = resolve_model(RopeSpec(method=name, factor=4.0 if name != "xpos" else None), {"": trained()}, None)
    plain = resolve_model(RopeSpec(method="rope"), {"": trained()}, None)
    assert resolved.block_seed(16) != plain.block_seed(16)
