"""The `format`s of JSON Schema as regular expressions, and what each may be narrowed to.

By the specification a format is a remark that a validator need not check, so one that is not known here asks for
nothing. A known one is followed. Dates and times are those of RFC 3339 from the year 1000 on, without leap seconds, and
have an end: fractions of a second have at most six digits, and so do the numbers of a duration.
"""

from __future__ import annotations

from typing import Any

_LEAP_YEAR = r"(?:[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = (
    r"(?:[1-9]\d{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"

_N = r"\d{1,6}"
_DURATION_TIME = f"T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_DURATION_DATE = f"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"
_DURATION = f"P(?:{_N}W|{_DURATION_DATE}(?:{_DURATION_TIME})?|{_DURATION_TIME})"

_HEX = "[0-9a-fA-F]"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4, _IPV6 = rf"{_BYTE}(?:\.{_BYTE}){{3}}", f"(?:{_HEX}{{1,4}}:){{7}}{_HEX}{{1,4}}"
_IPV4_NETWORK = rf"(?:{_IPV4}/32|{_BYTE}(?:\.{_BYTE}){{2}}\.0/24|{_BYTE}\.{_BYTE}\.0\.0/16|{_BYTE}\.0\.0\.0/8)"
_IPV4_INTERFACE = rf"{_IPV4}/(?:[12]?\d|3[0-2])"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"

PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "base64": "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "base64url": "(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?",
    **dict.fromkeys(("ipv4network", "ipvanynetwork"), _IPV4_NETWORK),
    **dict.fromkeys(("ipv4interface", "ipvanyinterface"), _IPV4_INTERFACE),
    "ipv6network": f"{_IPV6}/128",
    "ipv6interface": rf"{_IPV6}/(?:\d|[1-9]\d|1[01]\d|12[0-8])",
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    **{
        f"uuid{version}": f"{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}"
        for version in range(1, 9)
    },
}
"""Whole strings: an anchor stands at neither end."""

_NARROWER: dict[str, dict[str, Any]] = {
    **{name: {"format": "uri"} for name in ("url", "iri", "iri-reference", "uri-reference", "uri-template")},
    "idn-email": {"format": "email"},
    "idn-hostname": {"format": "hostname"},
    "ipvanyaddress": {"anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]},
}
"""What llguidance has no word for, by what it has: whatever is a URI is an IRI."""

_LLGUIDANCE = frozenset(("email", "hostname", "ipv4", "ipv6", "uri"))
"""Followed as it is."""


def format_schema(name: Any) -> dict[str, Any]:
    """The schema, for llguidance, of a string of this format; empty for a format that is not known."""
    if not isinstance(name, str):
        return {}
    if name in PATTERNS:
        return {"pattern": f"^(?:{PATTERNS[name]})$"}
    return {"format": name} if name in _LLGUIDANCE else _NARROWER.get(name, {})
