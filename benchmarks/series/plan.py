"""What the lab runs: the series, what each ablation changes, and which run starts from which. Choices are data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["series", "contrast", "ablation"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the lab, trained once a seed."""

    name: str
    config: str
    kind: Kind
    about: str
    """What it is, or what it changes, in a few words."""
    overrides: tuple[str, ...] = ()
    """``section.key=value``, laid over the config."""
    after: str = ""
    """The entry whose adapter, of the same seed, is this one's warm start; "" leaves the config's."""


V49 = "configs/tiny/v49.toml"


def _ablation(name: str, about: str, *overrides: str, after: str = "v46") -> Entry:
    return Entry(name, V49, "ablation", about, overrides, after)


ENTRIES: tuple[Entry, ...] = (
    Entry("v45c", "configs/tiny/v45c.toml", "series", "+1 if exact, else 0; ESI 1 oversampled 20 times"),
    Entry("v46", "configs/tiny/v46.toml", "series", "from a supervised start; prices by direction, no parse −0.5"),
    Entry("v47", "configs/tiny/v47.toml", "series", "v46's table, prices that count, a longer run"),
    Entry("v48", "configs/tiny/v48.toml", "series", "half the budget, no parse −0.5"),
    Entry("v49", V49, "series", "from v46; rule rows, no parse −2.0, the budget doubled", after="v46"),
    Entry(
        "v47-std",
        "configs/tiny/v47.toml",
        "contrast",
        "v47 with advantages divided by their group's std",
        ('advantage.kind="group"',),
    ),
    Entry(
        "v48-priced",
        "configs/tiny/v48.toml",
        "contrast",
        "v48 with v49's reward: no parse −2.0",
        ('reward={set="v49"}',),
    ),
    Entry(
        "v50",
        V49,
        "contrast",
        "v49 with triggers that read negation and paraphrase",
        ('reward.set="v50"',),
        "v46",
    ),
    _ablation("no-rules", "without the rule rows", 'reward.set="v49_without_rules"'),
    _ablation(
        "stacked", "penalties stack", 'reward={set="v49_stacked",allow_unsound=true,unsound_reason="an ablation"}'
    ),
    _ablation("no-kl", "no KL", "loss.beta=0.0"),
    _ablation("ddof-0", "std with ddof 0", "advantage.ddof=0"),
    _ablation("no-std", "advantages not divided by a std", 'advantage.kind="mean_only"'),
    _ablation("token-weights", "each token weighs the same", 'loss.token_weights="token"'),
    _ablation("masked", "truncated completions masked", "loss.mask_truncated=true"),
    _ablation("thinking-on", "thinking always on in rollouts", 'rollout.thinking="on"'),
    _ablation("thinking-off", "thinking always off in rollouts", 'rollout.thinking="off"'),
    _ablation("from-base", "from the base, without v46", 'lora.warm_start=""', after=""),
)


class PlanError(ValueError):
    """Runs that the lab does not know."""


def chosen(names: Sequence[str]) -> tuple[Entry, ...]:
    """The entries of these names and those they start from, in the lab's order.

    Args:
        names: of entries; "series", "contrast" and "ablation" stand for all of that kind, "all" for everything.

    >>> [entry.name for entry in chosen(["no-kl"])]
    ['v46', 'no-kl']

    Raises:
        PlanError: a name that no entry has.
    """
    by_name = {entry.name: entry for entry in ENTRIES}
    wanted: set[str] = set()
    for name in names:
        found = {e.name for e in ENTRIES if name in (e.name, e.kind, "all")}
        if not found:
            raise PlanError(f"no run is called {name!r}; known: {', '.join(by_name)}, series, contrast, ablation, all")
        wanted |= found
    while missing := {by_name[name].after for name in wanted} - wanted - {""}:
        wanted |= missing
    return tuple(entry for entry in ENTRIES if entry.name in wanted)
