"""The table that `grpo evaluate` prints: an ``eval.json`` in 80 columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grpo.runtime.terminal import pad_or_truncate, wrap

JsonObject = Mapping[str, Any]
"""A JSON object."""

WIDTH = 80
LABEL_WIDTH = 30
COLUMN_WIDTH = 25
MAX_IDS_SHOWN = 8

RATE_LABELS: Mapping[str, str] = {
    "exact": "exact",
    "adjacent": "adjacent (within one level)",
    "non_adjacent": "non-adjacent *",
    "under_triage": "under-triage",
    "over_triage": "over-triage",
    "dangerous_under": "under-triage by two or more *",
    "high_acuity_under": "of ESI 1, 2 under-triaged *",
    "no_parse": "no parse",
    "clipped_ratio": "cut by the budget",
}
"""Rate → its label. Each of those marked with * has been called the rate of dangerous errors."""
BASELINE_RATES = ("exact", "adjacent", "non_adjacent", "dangerous_under", "high_acuity_under")
LEVELS = ("1", "2", "3", "4", "5")


def evaluation_table(evaluation: JsonObject) -> str:
    """Return the whole table: what was evaluated, a block for each set, and the comparison."""
    return "\n".join(line.rstrip() for line in _lines(evaluation))


def percent(rate: float | None) -> str:
    """Return a rate with one decimal, but "100.0" and "0.0" only for exactly 1 and 0.

    >>> percent(0.5), percent(1.0), percent(0.9996), percent(0.0001), percent(None)
    ('50.0', '100.0', '>99.9', '<0.1', '–')
    """
    if rate is None:
        return "–"
    if 0 < rate < 0.0005:
        return "<0.1"
    return ">99.9" if 0.9995 <= rate < 1 else f"{100 * rate:.1f}"


def _lines(evaluation: JsonObject) -> Iterator[str]:
    yield from _header(evaluation)
    for name in dict.fromkeys(record["cases"] for record in evaluation["records"]):
        records = [record for record in evaluation["records"] if record["cases"] == name]
        yield from ("", *_rates(name, records))
        yield from ("", *_baselines(evaluation["baselines"][name]))
        yield from ("", *_confusion(records))
        if name in evaluation["agreement"]:
            yield from ("", *_agreement(evaluation["agreement"][name]))
        for record in records:
            yield from ("", *_errors(record, evaluation["reward"]["name"]))
    if evaluation["comparison"]:
        yield from ("", *_comparison(evaluation["comparison"]))


def _header(evaluation: JsonObject) -> Iterator[str]:
    settings, adapter = evaluation["settings"], evaluation["adapter"]
    sampling = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    budget = f"up to {settings['max_new_tokens']} new tokens"
    yield from _labelled("model", _name_and_hash(evaluation["model"]))
    yield from _labelled("adapter", _name_and_hash(adapter) if adapter else "none")
    yield from _labelled("answers", f"{settings['samples']} per case, {budget}, {sampling}, seed {settings['seed']}")
    yield from _labelled("reward", _name_and_hash(evaluation["reward"]))
    for line in evaluation["left_out"]:
        yield from _labelled("dropped", line)


def _name_and_hash(record: JsonObject) -> str:
    return f"{record['name']}, sha256 {record['sha256'][:12]}"


def _rates(name: str, records: Sequence[JsonObject]) -> Iterator[str]:
    yield _row(f"{name}, {records[0]['n']} cases", [f"thinking {record['thinking']}" for record in records])
    yield _row("", ["    %  95 % interval"] * len(records))
    for key, label in RATE_LABELS.items():
        yield _row(label, [_cell(record[key], record["intervals"][key]) for record in records])
    for rate in ("recall", "precision"):
        for level in LEVELS:
            cells = [_cell(record[rate][level][rate], record[rate][level]["interval"]) for record in records]
            yield _row(f"{rate} of ESI {level}", cells)
    yield _row("quadratic weighted kappa †", [_number(record["qwk"]) for record in records])
    yield _row("tokens per answer", [f"{record['mean_length']:5.1f}" for record in records])
    if "samples" in records[0]:
        yield from _samples([record["samples"] for record in records])
    yield '* each has been called "dangerous"   † over the answers that parse'
    n, acute = records[0]["n"], records[0]["high_acuity_n"]
    yield f"% of all {n} cases; for ESI 1, 2 of these {acute}; recall and precision of theirs"
    if "samples" in records[0]:
        yield "‡ most frequent level of a case's parsed answers; in a tie the most acute"


def _samples(records: Sequence[JsonObject]) -> Iterator[str]:
    for key in ("exact", "adjacent"):
        majorities = [record["majority"] for record in records]
        yield _row(f"majority ‡ {key}", [_cell(rates[key], rates["intervals"][key]) for rates in majorities])
    yield _row("all answers to a case equal", [_share_cell(record["unanimous"]) for record in records])
    yield _row("spread in levels", [_number(record["mean_spread"]) for record in records])
    for k in records[0]["pass_at_k"]:
        yield _row(f"pass@{k}", [_share_cell(record["pass_at_k"][k]) for record in records])


def _baselines(baselines: JsonObject) -> Iterator[str]:
    yield pad_or_truncate("constant answer, %", LABEL_WIDTH) + "".join(f"ESI {level}".rjust(9) for level in LEVELS)
    for key in BASELINE_RATES:
        cells = (percent(baselines[f"always_{level}"][key]).rjust(9) for level in LEVELS)
        yield pad_or_truncate(RATE_LABELS[key], LABEL_WIDTH) + "".join(cells)


def _confusion(records: Sequence[JsonObject]) -> Iterator[str]:
    predicted = "".join(label.rjust(5) for label in (*LEVELS, "none"))
    yield pad_or_truncate("gold, answer", 14) + "   ".join([predicted] * len(records))
    for gold in LEVELS:
        counts = ("".join(str(count).rjust(5) for count in record["confusion"][gold]) for record in records)
        yield pad_or_truncate(f"ESI {gold}", 14) + "   ".join(counts)


def _agreement(agreement: JsonObject) -> Iterator[str]:
    low, high = (percent(bound) for bound in agreement["interval"])
    same = f"on and off give the same answer in {percent(agreement['agreement'])} % ({low}–{high})"
    yield from _labelled("modes", f"{same}, Cohen's kappa {_number(agreement['kappa']).strip()}")
    yield from _labelled("", f"differ: {format_ids(agreement['differ'])}")
    on, off = len(agreement["only_on"]), len(agreement["only_off"])
    if on or off:
        p_value = f"McNemar p = {agreement['p_value']:.2g}"
        yield from _labelled("", f"right in one mode only: on {on}, off {off}, {p_value}")


def _errors(record: JsonObject, reward: str) -> Iterator[str]:
    errors = record["errors"]
    majority = " by majority" if "samples" in record else ""
    yield from _labelled("wrong", f"{errors['wrong']} of {record['n']} cases{majority}, thinking {record['thinking']}")
    steps = [
        f"{step} {side}-triaged {counts[side]}"
        for step, counts in errors["by_step"].items()
        for side in ("under", "over")
        if counts[side]
    ]
    steps += [f"no parse {errors['no_parse']}"] if errors["no_parse"] else []
    if steps:
        yield from _labelled("failed at", ", ".join(steps))
    lines = [
        f"{name}: broken in {rule['broken']} of the {rule['applies']} applicable cases: {format_ids(rule['cases'])}"
        for name, rule in errors["by_rule"].items()
        if rule["broken"]
    ] or [f"none of {reward}'s rules is broken" if errors["by_rule"] else f"{reward} has no rules"]
    if errors["unexplained"]:
        lines.append(f"no rule broken in {len(errors['unexplained'])} wrong cases: {format_ids(errors['unexplained'])}")
    for label, line in zip(["rules"] + [""] * (len(lines) - 1), lines, strict=True):
        yield from _labelled(label, line)
    worst = sorted(record["by_tag"].items(), key=lambda item: item[1]["exact"])
    tags = [f"{tag} {percent(rate['exact'])} % of {rate['n']}" for tag, rate in worst if rate["exact"] < 1]
    if tags:
        yield from _labelled("by tag", f"exact {format_ids(tags)}")


def _comparison(comparison: JsonObject) -> Iterator[str]:
    yield from _labelled("against", comparison["against"])
    if comparison["changed_settings"]:
        yield from _labelled("", f"evaluated with a different {', '.join(comparison['changed_settings'])}")
    for record in comparison["records"]:
        place = f"{record['cases']}, thinking {record['thinking']}"
        yield from _labelled("compared", f"{place}: {record['n']} cases in both")
        for key in ("fixed", "broken", "unchanged_right", "unchanged_wrong"):
            ids = f": {format_ids(record[key])}" if record[key] and key != "unchanged_right" else ""
            yield from _labelled("", f"{key.replace('_', ' ')} {len(record[key])}{ids}")
        yield from _labelled("", f"McNemar's exact test: p = {record['p_value']:.2g}")
    for record in comparison["not_compared"]:
        place = f"{record['cases']}, thinking {record['thinking']}"
        yield from _labelled("new", f"{place}: {record['n']} cases that the earlier evaluation lacks")


def _row(label: str, cells: Sequence[str]) -> str:
    return pad_or_truncate(label, LABEL_WIDTH) + "".join(pad_or_truncate(cell, COLUMN_WIDTH) for cell in cells)


def _cell(rate: float | None, interval: Sequence[float] | None) -> str:
    """
    >>> _cell(0.5, (0.25, 0.75)), _cell(None, None)
    (' 50.0  25.0–75.0', '    –')
    """
    if rate is None or interval is None:
        return "–".rjust(5)
    return f"{percent(rate):>5}  {percent(interval[0])}–{percent(interval[1])}"


def _share_cell(record: JsonObject) -> str:
    return _cell(record["share"], record["interval"])


def _number(value: float | None) -> str:
    return ("–" if value is None else f"{value:.3f}").rjust(6)


def format_ids(ids: Sequence[str]) -> str:
    """Return the first `MAX_IDS_SHOWN` ids and the number of the others.

    >>> format_ids([]), format_ids(["a", "b"])
    ('none', 'a, b')
    """
    more = f" and {len(ids) - MAX_IDS_SHOWN} more" if len(ids) > MAX_IDS_SHOWN else ""
    return (", ".join(ids[:MAX_IDS_SHOWN]) or "none") + more


def _labelled(label: str, text: str) -> Iterator[str]:
    """Yield the lines of a text, wrapped, with the label before the first."""
    for i, line in enumerate(wrap(text, WIDTH - 11)):
        yield f"{pad_or_truncate('' if i else label, 10)} {line}"
