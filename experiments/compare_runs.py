"""Shows how two runs of goodput_sweep differ: config, machine, step times, goodputs.

    python -m experiments.compare_runs runs/tiny runs/again

The goodput of each system in the second run over that in the first is paired by seed
where both runs had the same requests, and unpaired elsewhere; a line says which, and
why. Of the folders of simulate, compare_systems and placement_search it shows how they
were made: config, with the content of an engine's profile, and environment. Reads run
directories of today's and of older formats, and writes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.formats import STEP_TIMES
from disagg_jax.metrics import margin, rate_interval, unpaired_margin
from disagg_jax.scheduling import find_system
from experiments.cli.command import command
from experiments.report.intervals import interval_text, yes_or_no
from experiments.report.table import align, underlined
from experiments.runs.folder import Difference, differences
from experiments.runs.saved_run import SavedRun, by_target
from experiments.sweep.headline import good
from experiments.sweep.summary import per_seed

_LONGEST = 44  # letters of a value that are shown
_OF_A_START = ("command", "load_average")  # of env.json; the output may go elsewhere
# Parts of a config that decide which requests a seed has. Prompts of other sources than
# "random" are also a matter of the model's tokenizer and of the longest context.
_REQUESTS = ("workload", "trace", "trace_sha256")
_PROMPTS = ("model", "weights", "memory")
_ENDS = ("pass", "fail")  # of the rates of a goodput
_BOUNDED = "a bound only"


def compare(a: SavedRun, b: SavedRun) -> str:
    """Return the differences of two runs, a part for each kind.

    Raises:
      ValueError: if one is no run directory, or has a format that is not known.
    """
    configs = a.config(), b.config()
    parts = [
        [f"A  {a.path}", f"B  {b.path}"],
        _changes("config", differences(*configs)),
        _changes("environment", differences(_environment(a), _environment(b))),
        _step_times(a, b),
        *_goodputs(a, b),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _changes(title: str, found: Sequence[Difference]) -> list[str]:
    if not found:
        return [f"{title}: no difference"]
    rows = [(each.key, _short(each.a), _short(each.b)) for each in found]
    return underlined(align([(title, "A", "B"), *rows]))


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _environment(run: SavedRun) -> dict[str, Any]:
    """Return where and when a run was started last."""
    starts = run.read_json("env.json") or [{}]
    return {key: starts[-1][key] for key in starts[-1] if key not in _OF_A_START}


# -- step times ------------------------------------------------------------------------


def _step_times(a: SavedRun, b: SavedRun) -> list[str]:
    """Say by what factor the programs of B take longer than those of A."""
    of_a, of_b = _seconds(a), _seconds(b)
    for name, seconds in (("A", of_a), ("B", of_b)):
        if not seconds:
            return [f"step times: none in {name}"]
    both = [key for key in of_a if key in of_b]
    alone = f"{len(of_a) - len(both)} programs in A only, {len(of_b) - len(both)} in B"
    if not both:
        return [f"step times: {alone}"]
    ratios = {key: of_b[key] / of_a[key] for key in both}
    least, most = (end(both, key=lambda key: ratios[key]) for end in (min, max))
    return [
        f"step times, B over A: median {statistics.median(ratios.values()):.3f} "
        f"over {len(both)} programs; {alone}",
        f"  smallest {ratios[least]:.3f}: {least}",
        f"  largest {ratios[most]:.3f}: {most}",
    ]


def _seconds(run: SavedRun) -> Mapping[str, float]:
    record = run.read_json("step_times.json")
    return {} if record is None else STEP_TIMES.read(record)["seconds"]


# -- goodputs --------------------------------------------------------------------------


def _goodputs(a: SavedRun, b: SavedRun) -> Iterator[list[str]]:
    """Yield the goodputs of each target that both runs have."""
    found = a.read_json("summary.json"), b.read_json("summary.json")
    for name, summary in zip("AB", found, strict=True):
        if summary is None:
            yield [f"goodputs: no summary.json in {name}, whose run has not ended"]
            return
        if not {"systems", "targets"} & summary.keys():
            yield [f"goodputs: none in {name}, a run of another command"]
            return
    for name, summary in zip("AB", found, strict=True):
        if "missing" in summary:
            yield [f"{name} is not finished: it lacks {'; '.join(summary['missing'])}"]
    of_a, of_b = map(by_target, found)
    both = [target for target in of_a if target in of_b]
    if not both:
        yield [f"goodputs: no target in both; A has {[*of_a]}, B has {[*of_b]}"]
    for target in both:
        requests = _other_requests(a.config(), b.config())
        sides = (Side(a.config(), of_a[target]), Side(b.config(), of_b[target]))
        yield _of_target(target, *sides, requests)


@dataclasses.dataclass(frozen=True)
class Side:
    """What one run found by one target."""

    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def confidence(self) -> float:
        return self.summary.get("confidence", 0.95)  # runs before looks had one

    @property
    def independent(self) -> bool:
        return "no_intervals" not in self.summary

    def goodputs(self, system: str) -> dict[int, float]:
        """Return the goodput per device, or the throughput, of each seed."""
        systems = self.summary["systems"]
        name = find_system(system, systems)
        values = per_seed(systems[name]) if name in systems else []
        return dict(enumerate(values, self.config["seed"]))

    def bound(self, system: str) -> str | None:
        """Write what is known of a system that passed, or failed, at every rate.

        Of a throughput it is what is known if no higher rate was worse. It is None of a
        system whose value is known, and of one that did not take part.
        """
        systems = self.summary["systems"]
        found = systems.get(find_system(system, systems), {})
        if "throughput" in found:
            best = found["throughput"]["max_throughput_per_device"]["mean"]
            return None if found["throughput"]["bracketed"] else f">= {best:.4g}"
        goodput = found.get("goodput", {})
        passing, failing = (goodput.get(f"{n}_rps_per_device") for n in _ENDS)
        if (passing is None) == (failing is None):
            return None
        return f">= {passing:.4g}" if failing is None else f"< {failing:.4g}"

    def text(self, goodputs: Mapping[int, float]) -> str:
        if not goodputs:
            return "-"
        found = rate_interval(
            [*goodputs.values()],
            independent=self.independent,
            confidence=self.confidence,
        )
        return interval_text(found, ".4g")


def _other_requests(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the keys by which seeds of two runs have other requests."""
    random = all(config["workload"]["source"] == "random" for config in (a, b))
    keys = _REQUESTS if random else (*_REQUESTS, *_PROMPTS)
    of_a, of_b = ({key: config.get(key) for key in keys} for config in (a, b))
    return [each.key for each in differences(of_a, of_b)]


def _of_target(target: str, a: Side, b: Side, other_requests: list[str]) -> list[str]:
    """Return the goodput of each system on both sides, and their ratio."""
    asked = [good(side.summary) for side in (a, b)]
    said = asked[:1] if asked[0] == asked[1] else [f"A: {asked[0]}", f"B: {asked[1]}"]
    said = [f"{target} {line}".strip() for line in said]
    if a.summary["criterion"] != b.summary["criterion"]:
        return [*said, "no ratios: searched for by other criteria"]
    names = [*a.summary["systems"]]
    names += [n for n in b.summary["systems"] if find_system(n, names) not in names]
    rows = [_row(name, a, b, bool(other_requests)) for name in names]
    title = "goodput or throughput per device"
    head = (title, "A", "B", "B over A", "told apart", "compared")
    said += underlined(align([head, *rows], right=range(1, 4)))
    if any(row[-1] == _BOUNDED for row in rows):
        said.append(
            f"{_BOUNDED}: >= it passed at every rate tried, < it failed at every one; "
            "what it is over another is not known"
        )
    if other_requests:
        said.append(f"unpaired, as requests differ: {', '.join(other_requests)}")
    return said


def _row(system: str, a: Side, b: Side, unpaired: bool) -> list[str]:
    of_a, of_b = a.goodputs(system), b.goodputs(system)
    bounds = a.bound(system), b.bound(system)
    cells = [system, bounds[0] or a.text(of_a), bounds[1] or b.text(of_b)]
    if not of_a or not of_b:
        return [*cells, "-", "-", "-"]
    if any(bounds):
        return [*cells, "-", "-", _BOUNDED]
    options: Any = {
        "independent": a.independent and b.independent,
        "confidence": max(a.confidence, b.confidence),
    }
    seeds = [] if unpaired else sorted(of_a.keys() & of_b.keys())
    if seeds:
        sides = ([of[seed] for seed in seeds] for of in (of_b, of_a))
        found = margin(*sides, **options)
        how = f"paired, {len(seeds)} seeds"
    else:
        found = unpaired_margin([*of_b.values()], [*of_a.values()], **options)
        how = "unpaired"
    ratio = "-" if found.ratio is None else interval_text(found.ratio, ".3f")
    return [*cells, ratio, yes_or_no(found.clear), how]


@command(words=("RUN_A", "RUN_B"))
def main(a: str, b: str) -> None:
    print(compare(SavedRun(pathlib.Path(a)), SavedRun(pathlib.Path(b))))


if __name__ == "__main__":
    main()
