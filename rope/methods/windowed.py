"""Methods that keep the model's own frequencies and change positions past a window: no distance is one it never saw.

Let θ be the model's own. Near keys keep their exact distance; what a far key sees is each method's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from prerope.rope.methods.parts import (
    constant,
    fitting_group,
    group_of,
    groups_of,
    leaky_reading,
    own_reading,
    two_parts,
    window_of,
    window_warning,
)
from prerope.rope.reading import AngleMap, MethodError, Part, Reading, Rule, bucketed, everywhere
from prerope.rope.registry import Target, method

JAGGED_BLOCK = 128
STREAMING_SINKS = 4
STRING_LOCAL = 128


@method(
    "rerope",
    source="Su 2023, spaces.ac.cn 9708",
    use="Endless contexts: no distance ever passes the window. The cheapest decode, since far keys are not rotated.",
    takes=("window",),
)
def _rerope(t: Target) -> Rule:
    """min(d, w): far keys are read raw."""
    own, window = own_reading(t), window_of(t)
    reading = leaky_reading(own, window, torch.zeros_like(own.theta))
    return Rule({"window": window}, lambda _run: reading, warning=window_warning(window, t))


@method(
    "jagged_rerope",
    source="Su 2023, spaces.ac.cn 9708 (comments)",
    use="ReRoPE where a kernel should never compute a tile twice. It differs by up to a block of exact distances.",
    takes=("window", "group"),
)
def _jagged_rerope(t: Target) -> Rule:
    """ReRoPE whose far part ends on a block edge: j < B·⌊(i−w+1)/B⌋. Rows come in runs of B that share the edge."""
    own, window = own_reading(t), window_of(t)
    block = group_of(t, lambda: min(JAGGED_BLOCK, t.train_length - window))
    if window + block > t.train_length:
        raise MethodError(
            f"group (ROPE_GROUP) is {block}: jagged_rerope reads up to window + group tokens at their exact distance, "
            f"so it must be at most {t.train_length - window}, the trained length less the window (ROPE_WINDOW)"
        )
    near, far_query, unrotated = AngleMap(own.theta), constant(own, offset=window), constant(own)

    def reading(run_end: int) -> Reading:
        edge = run_end - window + 1 - block
        parts = (Part(near, near, first_key=edge), Part(far_query, unrotated, stop_key=edge))
        return Reading(parts if edge > 0 else (Part(near, near),), own.attention_factor)

    def run_end(position: int) -> int:
        return max(1, (position - window + 1) // block + 1) * block + window - 1

    return Rule({"window": window, "group": block}, reading, run_end, window_warning(window, t))


@method(
    "leaky_rerope",
    source="Su 2023, spaces.ac.cn 9708",
    use="A known longest prompt: choose k so that w + (n−w)/k stays inside the trained length.",
    takes=("window", "leak"),
)
def _leaky_rerope(t: Target) -> Rule:
    """w + (d−w)/k past the window."""
    own, window = own_reading(t), window_of(t)
    leak = 16.0 if t.spec.leak is None else t.spec.leak
    if not leak >= 1:
        raise MethodError(f"leak (ROPE_LEAK) is {leak}: it must be at least 1, the tokens that share a far position")
    reading = leaky_reading(own, window, own.theta / leak)
    return Rule({"window": window, "leak": leak}, lambda _run: reading, warning=window_warning(window, t))


@method(
    "dynamic_leaky",
    source="PreRoPE",
    use="The default past the trained length: nothing to choose, and no method measured here is surely better.",
    takes=("window",),
)
def _dynamic_leaky(t: Target) -> Rule:
    """Leaky ReRoPE with k = max(1, (n−w)/(L−w)): each row's farthest key sits exactly at L."""
    own, window, trained = own_reading(t), window_of(t), t.train_length

    def reading(n: int) -> Reading:
        leak = max(1.0, (n - window) / (trained - window))
        # Inside the trained length it is rope, and costs what rope costs.
        return own if leak == 1.0 else leaky_reading(own, window, own.theta / leak)

    return Rule({"window": window}, reading, bucketed(trained), window_warning(window, t))


@method(
    "dynamic_rerope",
    source="PreRoPE",
    use="Some of the layers (ROPE_LAYERS): those that find far facts by what they say, not by where they are.",
    takes=("window",),
)
def _dynamic_rerope(t: Target) -> Rule:
    """Rope in rows inside L; min(d, w) up to row 2L, from where the farthest key rises from w, to L at n = 5L."""
    own, window, trained = own_reading(t), window_of(t), t.train_length
    follows = bucketed(2 * trained)

    def reading(n: int) -> Reading:
        if n == trained:
            return own
        share = min(1.0, max(0, n - 2 * trained) / (3 * trained))
        return leaky_reading(own, window, own.theta * (share * (trained - window) / (n - window)))

    def run_end(position: int) -> int:
        return trained if position < trained else follows(position)

    return Rule({"window": window}, reading, run_end, window_warning(window, t))


@method(
    "self_extend",
    source="Jin 2024, arXiv 2401.01325",
    use="To compare with LongLM. Far order inside a group is lost; leaky_rerope keeps it.",
    takes=("window", "group"),
)
def _self_extend(t: Target) -> Rule:
    """⌊i/G⌋ + w − ⌊w/G⌋ and ⌊j/G⌋ past the window: LongLM's grouped attention."""
    own, window = own_reading(t), window_of(t)
    group = group_of(t, lambda: fitting_group(window, t))
    far_query = AngleMap(own.theta, group=group, shift=window - window // group)
    reading = two_parts(own, window, far_query, AngleMap(own.theta, group=group))
    parameters = {"window": window, "group": group}
    return Rule(parameters, lambda _run: own if group == 1 else reading, warning=window_warning(window, t))


@method(
    "dpe",
    source="Lu 2025, arXiv 2504.18857 (DPE)",
    use="Groups that a calibration has found for this model. Without any it is Self-Extend by a power of two.",
    takes=("window", "groups"),
)
def _dpe(t: Target) -> Rule:
    """⌊i/G⌋ + w − ⌊w/G⌋ and ⌊j/G⌋ past the window, with a group G for each share of the pairs; 1 keeps the distance."""
    own, window = own_reading(t), window_of(t)
    pairs = len(own.theta)
    groups = groups_of(t, window, pairs)
    of_pair = torch.tensor([groups[pair * len(groups) // pairs] for pair in range(pairs)])
    far_query = AngleMap(own.theta, offset=(window - window // of_pair) * own.theta, groups=of_pair)
    reading = two_parts(own, window, far_query, AngleMap(own.theta, groups=of_pair))
    parameters = {"window": window, "groups": list(groups)}
    return Rule(parameters, lambda _run: own if set(groups) == {1} else reading, warning=window_warning(window, t))


@method(
    "dual_chunk",
    source="An 2024, arXiv 2402.17463",
    use="To compare with ChunkLlama, and models that were tuned with it (Qwen2.5-1M).",
    takes=("window",),
)
def _dual_chunk(t: Target) -> Rule:
    """Chunks of s = L − w. Keys at j mod s; queries at i mod s, min(i mod s + s, L−1), L−1 for own, last, older."""
    own, window = own_reading(t), window_of(t)
    size, last = t.train_length - window, t.train_length - 1
    parts = _chunks(own, size, last)

    def reading(run_end: int) -> Reading:
        return Reading(parts(run_end), own.attention_factor)

    return Rule({"window": window, "chunk": size}, reading, lambda i: size * (i // size + 1), window_warning(window, t))


def tuned_dual_chunk(t: Target) -> Rule:
    """Dual-chunk attention with the config's own sizes: chunks of s = chunk_size − local_size, no position past
    chunk_size, and past the original length n, log-scaled attention: q·max(1, 0.1·ln(n/L) + 1)."""
    config = t.rotary.dual_chunk or {}
    own, last = own_reading(t), int(config["chunk_size"])
    window = int(config["local_size"])
    if not 0 < window < last:
        raise MethodError(f"dual_chunk_attention_config has chunk_size {last} and local_size {window}: it must be less")
    size, trained = last - window, t.train_length
    parts, bucket_end = _chunks(own, size, last), bucketed(trained)

    def reading(run_end: int) -> Reading:
        sharper = max(1.0, 0.1 * math.log(run_end / trained) + 1.0)
        return Reading(parts(run_end), own.attention_factor * math.sqrt(sharper))  # a factor is on q and on k

    def run_end(position: int) -> int:
        return min(size * (position // size + 1), bucket_end(position))

    return Rule({"window": window, "chunk": size}, reading, run_end)


def _chunks(own: Reading, size: int, last: int) -> Callable[[int], tuple[Part, ...]]:
    """Parts of the run of rows that ends at the argument: its own chunk, the one before, all older ones."""
    inside = AngleMap(own.theta, period=size)
    successive = AngleMap(own.theta, period=size, shift=size, cap=last)
    older = AngleMap(own.theta, shift=last, cap=last)

    def parts(run_end: int) -> tuple[Part, ...]:
        begin = size * ((run_end - 1) // size)
        found = [Part(inside, inside, first_key=begin)]
        if begin > 0:
            found.append(Part(successive, inside, first_key=begin - size, stop_key=begin))
        if begin > size:
            found.append(Part(older, inside, stop_key=begin - size))
        return tuple(found)

    return parts


@method(
    "string",
    source="An 2024, arXiv 2410.18745 (STRING)",
    use="Prompts inside the trained length: the distances that training showed least are not read. It ends near 1.3 L.",
    takes=("window",),
)
def _string(t: Target) -> Rule:
    """d − w + b past the window w = L/3, b = 128 or half of w: the largest distances go unused."""
    own, shift = own_reading(t), window_of(t, t.train_length // 3)
    local = min(STRING_LOCAL, shift // 2)
    reading = two_parts(own, shift, AngleMap(own.theta, shift=local - shift), own.parts[0].key)
    return Rule({"window": shift, "local": local}, lambda _run: reading, warning=window_warning(shift, t))


@method(
    "streaming",
    source="Xiao 2023, arXiv 2309.17453 (StreamingLLM)",
    use="Endless chats where only the recent past matters. What lies between sinks and window is never read.",
    takes=("window", "sinks"),
)
def _streaming(t: Target) -> Rule:
    """The last w keys at their exact distance, the first S as if right before them; none between is read."""
    own = own_reading(t)
    sinks = STREAMING_SINKS if t.spec.sinks is None else t.spec.sinks
    if not 0 <= sinks < t.train_length:
        raise MethodError(f"sinks (ROPE_SINKS) is {sinks}: it must be between 0 and {t.train_length - 1}")
    window = t.train_length - sinks if t.spec.window is None else t.spec.window
    if not 0 < window <= t.train_length - sinks:
        raise MethodError(
            f"window (ROPE_WINDOW) is {window}: with {sinks} sinks (ROPE_SINKS) it must be between 1 and "
            f"{t.train_length - sinks}, so that both fit the trained length"
        )
    near, capped = AngleMap(own.theta), AngleMap(own.theta, cap=sinks + window - 1)
    recent = Part(near, near, first_key=sinks, d_max=window)
    reading = Reading((recent, Part(capped, near, stop_key=sinks))[: 2 if sinks else 1], own.attention_factor)
    full = sinks + window  # rows before this one still read every key
    return Rule(
        {"window": window, "sinks": sinks},
        lambda run: own if run == full else reading,
        lambda i: full if i < full else everywhere(i),
    )
