"""Runs every case of a study, writes the files of each, and says what was found."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from disagg_jax.metrics import SLO
from disagg_jax.progress import Progress, silent
from disagg_jax.runlog import EventLog
from disagg_jax.sim import Simulation
from experiments.cli.progress import to_stderr
from experiments.cli.traffic_flags import Traffic
from experiments.report.draw import draw
from experiments.report.intervals import number
from experiments.runs.folder import write_json, write_text
from experiments.simulated.files import FILES, read_summary, write_run, write_timeline
from experiments.simulated.report import Summary, curve_panels, table, text
from experiments.simulated.served import NO_TARGETS, Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Deployments that are simulated with the same traffic at one or several rates."""

    simulation: Simulation
    cases: Sequence[Case]
    slo: SLO
    traffic: Traffic

    @property
    def result(self) -> str:
        """Return the file that tells that a folder has results."""
        return "requests.csv" if len(self.cases) == 1 else "table.txt"

    @property
    def files(self) -> str:
        """Name the files with results."""
        if len(self.cases) == 1:
            return ", ".join(FILES)
        return f"table.txt, curves.png; for each run a folder with {', '.join(FILES)}"

    @property
    def longest_tokens(self) -> int:
        """Return the prompt and output of the longest request, in tokens."""
        added = self.simulation.extra_tokens
        return max(
            request.prompt_tokens + request.max_tokens - added
            for case in self.cases
            for request in case.requests
        )

    def serve(
        self,
        out: pathlib.Path,
        progress: Progress = silent,
        timeline: pathlib.Path | None = None,
    ) -> list[Summary]:
        """Simulate all cases, write the files of each when it is done, and sum it up.

        Of a run no more than its summary is kept: runs are long, and may be many. A run
        whose files are there is not simulated again.

        Args:
          out: an existing folder. Of several cases each has a folder in it.
          timeline: a file for the run of a single case as a timeline, which needs it to
            be simulated.
        """
        if "trace" in self.traffic.record:
            write_json(out / "trace.json", self.traffic.record["trace"])
        several = len(self.cases) > 1
        folders = {c.name: out / c.name if several else out for c in self.cases}
        read = {} if timeline else {n: read_summary(folders[n]) for n in folders}
        found: dict[str, Summary] = {n: done for n, done in read.items() if done}
        if found:
            to_stderr(f"{out}: {len(found)} of {len(self.cases)} runs found")
        missing = [case for case in self.cases if case.name not in found]
        for i, case in enumerate(missing):
            progress("runs", i, len(missing), f"now {_title(case)}")
            found[case.name] = self._serve(case, folders[case.name], timeline)
        summaries = [found[case.name] for case in self.cases]
        if several:
            write_text(out / "table.txt", self.text(summaries) + "\n")
            draw(curve_panels(summaries), self.title, out / "curves.png")
        return summaries

    def _serve(
        self, case: Case, out: pathlib.Path, timeline: pathlib.Path | None
    ) -> Summary:
        log = EventLog() if timeline else None
        served = case.serve(log)
        title, extra = f"{self.title}\n{_title(case)}", self.simulation.extra_tokens
        summary = write_run(out, served, self.slo, title, extra)
        if timeline and log:
            write_timeline(timeline, served, log)
        return summary

    def text(self, found: Sequence[Summary]) -> str:
        """Write the result of one case in full, or a table of several."""
        lines = [self.title]
        if len(found) == 1:
            lines += [_title(self.cases[0]), "", text(found[0])]
        else:
            lines += ["", table(found)]
        return "\n".join([*lines, *filter(None, [self.simulation.mark])])

    @property
    def title(self) -> str:
        """Say what all cases have in common."""
        simulation, cost = self.simulation, self.simulation.cost
        wires = simulation.wires
        if simulation.between:
            wires += f", between nodes over {simulation.between}"
        targets = "" if self.slo == NO_TARGETS else f"\n{self.slo}"
        requests = len(self.cases[0].requests)
        said = [
            f"{simulation.model.name} by {cost.name}, KV over {wires}",
            simulation.checked,
            f"{self.traffic.said}; N={requests}{targets}",
        ]
        return "\n".join(filter(None, said))


def _title(case: Case) -> str:
    deployment, rate = case.deployment, number(case.offered_rps, ".4g")
    devices = f"{deployment.devices} devices, {case.system}"
    return f"{deployment} ({devices}) at {rate} requests/s"
