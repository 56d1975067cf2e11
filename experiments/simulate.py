"""Simulates traffic on deployments: latencies, what was busy, and who was refused.

    python -m experiments.simulate --trace=FILE.csv --config=opt13b_a100 \\
        --deployment=prefill:tp2,decode:tp1 --slo=0.5,0.04 --out=runs/simulated
    python -m experiments.simulate --hardware=h100 --out=runs/curve --rate=25,50,75 \\
        --workload=lognormal:500:0.5:1500,uniform:16:64 --slo=0.2,0.02 \\
        --deployment="2xcolocated:tp1;prefill:tp1,decode:tp1"

FILE is a CSV file with columns for arrival (arrival_s or arrival_ms), prompt
(prompt_tokens or prompt_len) and output (output_tokens or output_len), or a trace of
Azure, BurstGPT, Mooncake, Bailian, splitwise-sim, Vidur or ShareGPT, which may be
gzipped. Rows of one tick of a coarse clock are spread over it, but with --ties=keep.
A file without times needs --rate, and so does a --workload. Requests over the
simulation's context limit are refused: --max_context raises it. A deployment reads like
prefill:tp1,decode:tp1 or 2xprefill:tp1,1xdecode:tp2pp2 or colocated:tp1. What is
simulated is a --config of experiments/configs/named_simulations.py, or --model on
--hardware by a --cost model; --system names whose policies serve.

It prints percentiles, attainment of the targets of --slo, the mean of each stage of a
request, the share of the time in which each device and link was busy, and how many
requests were refused. If more than 1 % were, the exit code is 3, after all files are
written; with --allow_refused it is 0.

OUT must hold no other run. The same command finds the runs that are done there, and
simulates the others. It gets config.json, env.json, of a trace trace.json, which
says how it was read, and:
requests.csv: for each request ttft_s, tpot_s and the five stages, floats in full; where
a request was refused they are empty, and `error` says why. `good` is 1 of one that
finished within the targets, so that its mean is the attainment, and 0 of others.
summary.json: the run under the keys of vLLM's benchmark, with what was busy.
latencies.png: latencies by arrival, and the requests in each stage over time.
With several rates or deployments each run has a folder with these three, and OUT gets
table.txt and curves.png.
--chrome_trace=FILE.json writes one run as a timeline that Perfetto opens: a lane for
each device, link and request.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics import SLO
from disagg_jax.scheduling.system import get_systems
from disagg_jax.sim import Simulation
from disagg_jax.sim.hardware import get_link
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags, expect_used
from experiments.cli.progress import ProgressLines
from experiments.cli.simulation_flags import SimulationFlags
from experiments.cli.traffic_flags import TrafficFlags
from experiments.runs.folder import plain, profile_record, run_folder
from experiments.simulated.report import Summary, refused_share
from experiments.simulated.served import NO_TARGETS, list_cases
from experiments.simulated.study import Study

_MOST_REFUSED = 0.01  # share of a run's requests
_TOO_MANY_REFUSED = 3  # exit code

FLAGS = Flags()
_TRAFFIC = TrafficFlags(FLAGS)
_SIMULATED = SimulationFlags(FLAGS)
_SYSTEM = FLAGS.list(
    "system",
    None,
    "Whose policies serve; one of your own is module:attribute. Of several, such as "
    "sarathi_serve,disaggregated, each serves the roles it has. By default those of "
    "--config, else vllm_v0 on colocated instances and disaggregated on others; with "
    "--engine the engine's own, and its limits for all.",
)
_DEPLOYMENT = FLAGS.multi_string(
    "deployment",
    REQUIRED,
    "Which instances serve; several, repeated or with ; between, make a table.",
)
_SLO = FLAGS.string("slo", None, "TTFT_S,TPOT_S: targets in seconds.")
_OUT = FLAGS.string("out", REQUIRED, "Folder for the results.")
_MAX_CONTEXT = FLAGS.integer(
    "max_context",
    None,
    "Prompt and output of a request, in tokens; by default that of --config, or 2048.",
    lower_bound=1,
)
_ALLOW_REFUSED = FLAGS.boolean(
    "allow_refused", False, "End with 0 even if more than 1 % of a run were refused."
)
_STREAMED = FLAGS.integer(
    "streamed_groups",
    None,
    "Layer groups in which KV leaves while its prompt is computed; 0: all of it after.",
    lower_bound=0,
)
_CHROME_TRACE = FLAGS.string(
    "chrome_trace", None, "File for the run as a timeline, see ui.perfetto.dev."
)


# -- what is asked -------------------------------------------------------------------


def _deployments() -> list[Deployment]:
    texts = [text for given in _DEPLOYMENT.value for text in given.split(";")]
    return [Deployment.parse(text) for text in texts]


def _simulation(deployments: Sequence[Deployment]) -> Simulation:
    simulation = _SIMULATED.read(_MAX_CONTEXT.value)
    if _SYSTEM.value is not None:
        policies, engine = get_systems(_SYSTEM.value), simulation.engine
        limited = policies if engine is None else engine.limit(policies)
        simulation = dataclasses.replace(simulation, policies=limited)
    if _STREAMED.value is not None:
        sends = all(deployment.of(Role.PREFILL) for deployment in deployments)
        expect_used(
            sends or _STREAMED.value == simulation.streamed_groups,
            _STREAMED,
            expected="prefill and decode instances",
            got=f"--deployment={'; '.join(map(str, deployments))}",
        )
        simulation = dataclasses.replace(simulation, streamed_groups=_STREAMED.value)
    return simulation


def _study() -> Study:
    deployments = _deployments()
    simulation = _simulation(deployments)
    traffic = _TRAFFIC.read(simulation)
    return Study(
        simulation=simulation,
        cases=list_cases(simulation, deployments, traffic.requests),
        slo=SLO.parse(_SLO.value) if _SLO.value else NO_TARGETS,
        traffic=traffic,
    )


def _record(study: Study) -> dict[str, Any]:
    """Return what the results follow from."""
    simulation, traffic = study.simulation, study.traffic
    links = {"inside": simulation.inside, "between": simulation.between}
    deployments = dict.fromkeys(str(case.deployment) for case in study.cases)
    return {
        **traffic.record,
        "rates_rps": list(traffic.requests),
        "slo": plain(study.slo),
        "config": _SIMULATED.config,
        "system": ",".join(_SYSTEM.value or []) or None,
        "simulation": plain(simulation),
        # Beside the names: a file of one's own may change.
        "model": plain(simulation.model),
        "hardware": plain(_SIMULATED.hardware),
        **profile_record(simulation),
        "links": {where: plain(get_link(n)) for where, n in links.items() if n},
        "deployment": ";".join(deployments),
    }


# -- what is done --------------------------------------------------------------------


def _timeline_file(study: Study) -> pathlib.Path | None:
    """Return the file for the timeline of one run, which can be written."""
    if _CHROME_TRACE.value is None:
        return None
    one, got = "one rate and one deployment", f"{len(study.cases)} runs"
    expect_used(len(study.cases) == 1, _CHROME_TRACE, expected=one, got=got)
    path = pathlib.Path(_CHROME_TRACE.value)
    path.touch()  # fails now rather than after the run
    return path


def _check_refused(study: Study, found: Sequence[Summary]) -> None:
    """Exit with `_TOO_MANY_REFUSED` if a run refused too many, unless it may."""
    most = max(map(refused_share, found))
    if most > _MOST_REFUSED and not _ALLOW_REFUSED.value:
        print(
            f"{most:.1%} of the requests of a run were refused: expected at most "
            f"{_MOST_REFUSED:.0%}. --max_context={study.longest_tokens} has room for "
            "the longest, more devices have more KV memory, and --allow_refused lets "
            "it be",
            file=sys.stderr,
        )
        sys.exit(_TOO_MANY_REFUSED)


@command(FLAGS)
def main() -> None:
    study = _study()
    timeline, out = _timeline_file(study), pathlib.Path(_OUT.value)
    with run_folder(out, _record(study), study.result):
        found = study.serve(out, ProgressLines().step, timeline)
    print(f"{study.text(found)}\n\n{out}: {study.files}")
    _check_refused(study, found)


if __name__ == "__main__":
    main()
