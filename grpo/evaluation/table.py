"""An ``eval.json`` of `grpo evaluate` as a table of 80 columns, for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grpo.runtime.terminal import fit, wrap

Record = Mapping[str, Any]
"""A JSON object."""

WIDTH = 80
LABEL = 30
COLUMN = 25
IDS_SHOWN = 8
TAGS_SHOWN = 8

ROWS: Mapping[str, str] = {
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
"""Rate → its row. The starred have each been called dangerous errors."""
CONSTANT_ROWS = ("exact", "adjacent", "non_adjacent", "dangerous_under", "high_acuity_under")
LEVELS = ("1", "2", "3", "4", "5")


def scorecard(evaluation: Record) -> str:
    """The whole table: what was evaluated, then a block for each set, then the comparison."""
    return "\n".join(line.rstrip() for line in _lines(evaluation))


def percent(share: float | None) -> str:
    """One decimal, and never "100.0" or "0.0" for what is not.

    >>> percent(0.5), percent(1.0), percent(0.9996), percent(0.0001), percent(None)
    ('50.0', '100.0', '>99.9', '<0.1', '–')
    """
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "<0.1"
    return ">99.9" if 0.9995 <= share < 1 else f"{100 * share:.1f}"


def _lines(evaluation: Record) -> Iterator[str]:
    yield from _header(evaluation)
    for name in dict.fromkeys(record["cases"] for record in evaluation["records"]):
        records = [record for record in evaluation["records"] if record["cases"] == name]
        yield ""
        yield from _rates(name, records)
        yield ""
        yield from _constants(evaluation["baselines"][name])
        yield ""
        yield from _confusion(records)
        if name in evaluation["agreement"]:
            yield ""
            yield from _agreement(evaluation["agreement"][name])
        for record in records:
            yield ""
            yield from _errors(record, evaluation["reward"]["name"])
    if evaluation["comparison"]:
        yield from _comparison(evaluation["comparison"])


def _header(evaluation: Record) -> Iterator[str]:
    settings, adapter = evaluation["settings"], evaluation["adapter"]
    yield from _told("model", f"{evaluation['model']['name']}, sha256 {evaluation['model']['sha256'][:12]}")
    yield from _told("adapter", f"{adapter['name']}, sha256 {adapter['sha256'][:12]}" if adapter else "none")
    how = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    yield from _told(
        "answers",
        f"{settings['samples']} a case, up to {settings['max_new_tokens']} new tokens, {how}, seed {settings['seed']}",
    )
    yield from _told("reward", f"{evaluation['reward']['name']}, sha256 {evaluation['reward']['sha256'][:12]}")
    for line in evaluation["left_out"]:
        yield from _told("left out", line)


def _rates(name: str, records: Sequence[Record]) -> Iterator[str]:
    yield _row(f"{name}, {records[0]['n']} cases", [f"thinking {record['thinking']}" for record in records])
    yield _row("", ["    %  95 % interval"] * len(records))
    for key, label in ROWS.items():
        yield _row(label, [_cell(record[key], record["intervals"][key]) for record in records])
    for part in ("recall", "precision"):
        for level in LEVELS:
            parts = [record[part][level] for record in records]
            yield _row(f"{part} of ESI {level}", [_cell(one[part], one["interval"]) for one in parts])
    yield _row("quadratic weighted kappa †", [_number(record["qwk"]) for record in records])
    yield _row("tokens an answer", [f"{record['mean_length']:5.1f}" for record in records])
    if "samples" in records[0]:
        yield from _samples([record["samples"] for record in records])
    yield '* each has been called "dangerous"   † over answers that parse'
    n, acute = records[0]["n"], records[0]["high_acuity_n"]
    yield f"of all {n} cases; of ESI 1, 2 of those {acute} alone; recall and precision of theirs"
    if "samples" in records[0]:
        yield "‡ of a case's answers that parse; of several, the most acute"


def _samples(found: Sequence[Record]) -> Iterator[str]:
    for key in ("exact", "adjacent"):
        cells = [_cell(one["majority"][key], one["majority"]["intervals"][key]) for one in found]
        yield _row(f"majority ‡ {key}", cells)
    yield _row(
        "all answers of a case equal", [_cell(o["unanimous"]["share"], o["unanimous"]["interval"]) for o in found]
    )
    yield _row("levels between them", [_number(one["mean_spread"]) for one in found])
    for k in found[0]["pass_at_k"]:
        cells = [_cell(one["pass_at_k"][k]["share"], one["pass_at_k"][k]["interval"]) for one in found]
        yield _row(f"pass@{k}", cells)


def _constants(baselines: Record) -> Iterator[str]:
    yield fit("one level always, %", LABEL) + "".join(f"ESI {level}".rjust(9) for level in LEVELS)
    for key in CONSTANT_ROWS:
        cells = (percent(baselines[f"always_{level}"][key]).rjust(9) for level in LEVELS)
        yield fit(ROWS[key], LABEL) + "".join(cells)


def _confusion(records: Sequence[Record]) -> Iterator[str]:
    said = "".join(label.rjust(5) for label in (*LEVELS, "none"))
    yield fit("gold, said", 14) + "   ".join(said for _ in records)
    for gold in LEVELS:
        counts = ("".join(str(count).rjust(5) for count in record["confusion"][gold]) for record in records)
        yield fit(f"ESI {gold}", 14) + "   ".join(counts)


def _agreement(found: Record) -> Iterator[str]:
    low, high = (percent(bound) for bound in found["interval"])
    same = f"on and off give the same answer in {percent(found['agreement'])} % ({low}–{high})"
    yield from _told("modes", f"{same}, Cohen's kappa {_number(found['kappa']).strip()}")
    yield from _told("", f"differ: {_ids(found['differ'])}")
    if found["only_on"] or found["only_off"]:
        yield from _told("", f"right in one mode alone: on {len(found['only_on'])}, off {len(found['only_off'])}, "
                         f"McNemar p = {found['p_value']:.2g}")  # fmt: skip


def _errors(record: Record, reward: str) -> Iterator[str]:
    triage = record["errors"]
    by = " by the majority of their answers" if "samples" in record else ""
    yield from _told("wrong", f"{triage['wrong']} of {record['n']} cases{by}, thinking {record['thinking']}")
    steps = [
        f"{step} {side}-triaged {counts[side]}"
        for step, counts in triage["by_step"].items()
        for side in ("under", "over")
        if counts[side]
    ]
    steps += [f"no parse {triage['no_parse']}"] if triage["no_parse"] else []
    if steps:
        yield from _told("failed at", ", ".join(steps))
    told = [
        f"{name}: broken in {rule['broken']} of the cases it speaks about ({rule['applies']}): {_ids(rule['cases'])}"
        for name, rule in triage["by_rule"].items()
        if rule["broken"]
    ] or [f"none of {reward}'s rules is broken" if triage["by_rule"] else f"{reward} has none"]
    if triage["unexplained"]:
        told.append(f"no rule broken in {len(triage['unexplained'])} wrong cases: {_ids(triage['unexplained'])}")
    for i, one in enumerate(told):
        yield from _told("" if i else "rules", one)
    tags = [f"{tag} {counts['wrong']}/{counts['n']}" for tag, counts in triage["by_tag"].items()]
    if tags:
        more = f" and {len(tags) - TAGS_SHOWN} more" if len(tags) > TAGS_SHOWN else ""
        yield from _told("tags", ", ".join(tags[:TAGS_SHOWN]) + more)


def _comparison(comparison: Record) -> Iterator[str]:
    yield ""
    yield from _told("against", comparison["against"])
    if comparison["changed_settings"]:
        yield from _told("", f"which was evaluated with other {', '.join(comparison['changed_settings'])}")
    for found in comparison["records"]:
        yield from _told("compared", f"{found['cases']}, thinking {found['thinking']}: {found['n']} cases in both")
        for key in ("fixed", "broken", "unchanged_right", "unchanged_wrong"):
            ids = f": {_ids(found[key])}" if found[key] and key != "unchanged_right" else ""
            yield from _told("", f"{key.replace('_', ' ')} {len(found[key])}{ids}")
        yield from _told("", f"McNemar's exact test: p = {found['p_value']:.2g}")
    for left in comparison["not_compared"]:
        where = f"{left['cases']}, thinking {left['thinking']}"
        yield from _told("not in it", f"{where}: {left['n']} cases, which are compared with nothing")


def _row(label: str, cells: Sequence[str]) -> str:
    return fit(label, LABEL) + "".join(fit(cell, COLUMN) for cell in cells)


def _cell(share: float | None, interval: Sequence[float] | None) -> str:
    """
    >>> _cell(0.5, (0.25, 0.75)), _cell(None, None)
    (' 50.0  25.0–75.0', '    –')
    """
    if share is None or interval is None:
        return "–".rjust(5)
    return f"{percent(share):>5}  {percent(interval[0])}–{percent(interval[1])}"


def _number(value: float | None) -> str:
    return ("–" if value is None else f"{value:.3f}").rjust(6)


def _ids(ids: Sequence[str]) -> str:
    """
    >>> _ids([]), _ids(["a", "b"])
    ('none', 'a, b')
    """
    more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
    return (", ".join(ids[:IDS_SHOWN]) or "none") + more


def _told(label: str, text: str) -> Iterator[str]:
    """Text under a label, wrapped."""
    for i, line in enumerate(wrap(text, WIDTH - 11)):
        yield f"{fit('' if i else label, 10)} {line}"
