"""Comparisons of systems whose winner is known by arithmetic, and the command."""

import dataclasses
import itertools
import json
import math

import pytest

from disagg_jax.deployment import Deployment, Role
from disagg_jax.formats import MAPS
from disagg_jax.metrics.attainment import SLO
from disagg_jax.progress import silent
from disagg_jax.scheduling import DISAGGREGATED, SYSTEMS
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.tuning import TuningInputs
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.search.cells import compare
from disagg_jax.search.comparison import (
    KNOWN,
    POLICIES,
    ComparisonSpec,
    SystemResult,
    deployments,
    judge,
    run_s,
    search_system,
    simulate,
    system_searches,
)
from disagg_jax.search.maps import (
    COLOCATED,
    INFEASIBLE,
    UNCLEAR,
    Axis,
    Cell,
    Map,
    lengths_map,
    regions,
    slos_map,
)
from disagg_jax.search.placement import PLACED
from disagg_jax.sim.engines import get_engine
from disagg_jax.sim.simulation import Simulation
from disagg_jax.workload.lengths import FixedLengths
from disagg_jax.workload.workload import RandomWorkload
from experiments import compare_systems
from experiments.compare_systems import asked_systems, numbers
from experiments.comparison.report import answer, plot, record, sentence, text
from experiments.configs.named_simulations import get_simulation
from experiments.configs.paper_workloads import get_workload
from tests.commands import run_command
from tests.linear_simulation import LINEAR


def of(*names):
    """The systems of these names."""
    return {name: KNOWN[name] for name in names}


def linear_spec(**changes):
    fields = {
        "simulation": LINEAR,
        "devices": 2,
        "systems": of("vllm_v0", DISAGGREGATED),
        "sizes": (100, 200),
        "num_requests": 150,
        "looks": (3,),
    }
    return ComparisonSpec(**(fields | changes))


def judged(output, slo):
    found = system_searches(linear_spec(), Cell(workload=hundred(output), slo=slo))
    return judge([search_system(each) for each in found])


def hundred(output):
    return RandomWorkload(
        prompt=FixedLengths(tokens=100), output=FixedLengths(tokens=output)
    )


def test_without_decodes_half_of_the_devices_of_a_pair_is_idle():
    # A prompt takes 0.1 s, so colocated devices serve up to 10 a second each, and the
    # pair as many with one device of two. Queues are shorter where two take from one.
    cell = judged(output=1, slo=SLO(ttft_s=0.5, tpot_s=1.0))
    assert cell.verdict == COLOCATED
    assert cell.winner.system == "vllm_v0" and 6 < cell.winner.rps < 10
    assert 0.35 < cell.over.ratio.mean < 0.5
    assert cell.over.ratio.high < 1
    # The winner's margin is over the only other system: the inverse.
    assert cell.over_runner_up.ratio.mean == pytest.approx(1 / cell.over.ratio.mean)


def test_where_each_prefill_stalls_a_decode_too_long_a_pair_wins():
    # 10 gaps of 10 ms, and a target of 15: a stall of 0.1 s makes the mean 20 ms. A
    # colocated request is good only if no other is prefilled beside it in the 0.2 s of
    # its life, so each device serves about one request at a time: less than 5 a second,
    # and 90 % of random arrivals do not come so well spread. A pair keeps TPOT at any
    # rate: 10 a second, 5 for each device, less the queue's share.
    cell = judged(output=11, slo=SLO(ttft_s=0.5, tpot_s=0.015))
    assert cell.verdict == DISAGGREGATED
    assert cell.winner.system == DISAGGREGATED and 3 < cell.winner.rps < 5
    assert cell.pair[1].rps < 2.5
    assert cell.over.ratio.low > 1.5 and cell.over.clear


def test_targets_below_the_unloaded_latency_make_a_cell_infeasible():
    # A prompt takes 0.1 s, twice the target.
    cell = judged(output=11, slo=SLO(ttft_s=0.05, tpot_s=0.1))
    assert cell.verdict == INFEASIBLE
    assert cell.why_infeasible == "even alone vllm_v0 needs 2 x the targets"
    assert [found.rps for found in cell.ranked] == [0, 0]
    assert cell.over.ratio is None and not cell.over.clear


# ---- what is searched ----------------------------------------------------------------


def test_all_devices_are_used_in_all_ways():
    assert [str(d) for d in deployments([Role.COLOCATED], 4, (1, 2, 3, 4))] == [
        "4xcolocated:tp1",
        "2xcolocated:tp2",
        "colocated:tp4",
    ]
    pairs = [str(d) for d in deployments([Role.PREFILL, Role.DECODE], 4, (1, 2, 3, 4))]
    assert sorted(pairs) == sorted(
        [
            "prefill:tp1,3xdecode:tp1",
            "2xprefill:tp1,2xdecode:tp1",
            "3xprefill:tp1,decode:tp1",
            "2xprefill:tp1,decode:tp2",
            "prefill:tp2,2xdecode:tp1",
            "prefill:tp2,decode:tp2",
            "prefill:tp1,decode:tp3",
            "prefill:tp3,decode:tp1",
        ]
    )


def small_spec(**changes):
    simulation = Simulation.of("opt-13b", "a100-80g", max_context=4096)
    fields = {"simulation": simulation, "devices": 2, "sizes": (128, 256, 512, 1024)}
    fields["looks"] = (3,)
    return ComparisonSpec(**(fields | changes))


def test_all_candidates_of_a_cell_get_equal_requests():
    workload, slo = get_workload("fixed:512x64"), SLO(ttft_s=1.0, tpot_s=0.1)
    made = system_searches(small_spec(), Cell(workload=workload, slo=slo))
    searches = [o.candidate.search for c in made for o in c.options]
    (n,) = {search.num_requests for search in searches}
    assert {search.seeds for search in searches} == {(0, 1, 2)}
    # Three lives of 1 + 6.4 s, at a rate that no system reaches.
    assert run_s(slo, 64) == pytest.approx(22.2)
    assert run_s(SLO(ttft_s=4.0, tpot_s=0.1), 64) == 40.0
    capacities = [search.capacity_rps() for search in searches]
    # They are estimated by as many requests as there are, here all the same.
    assert n == math.ceil(22.2 * max(capacities))


def test_the_step_size_follows_the_tpot_target():
    # 100 prompt tokens and 10 gaps: of 20 tokens one decodes, of 40 three. A mixed step
    # takes 10 ms and 19, or 37.
    spec = linear_spec(systems=of("sarathi_serve", DISAGGREGATED), sizes=(20, 40))
    for tpot_s, size, step_ms in ((0.03, 20, 29), (0.05, 40, 47)):
        slo = SLO(ttft_s=0.5, tpot_s=tpot_s)
        (chunked, _) = system_searches(spec, Cell(workload=hundred(11), slo=slo))
        (option,) = chunked.options
        assert option.parameters == (
            f"token_budget = {size}: the largest step within TPOT: {step_ms} of "
            f"{tpot_s * 1e3:.3g} ms",
        )


def test_given_budgets_are_all_tried():
    spec = small_spec(systems=of("vllm_v0", DISAGGREGATED), budgets=(256, 512))
    cell = Cell(workload=get_workload("fixed:512x64"), slo=SLO(ttft_s=1.0, tpot_s=0.1))
    vllm, pair = system_searches(spec, cell)
    assert [o.candidate.name for o in vllm.options] == [
        "2xcolocated:tp1 256 tokens",
        "2xcolocated:tp1 512 tokens",
        "colocated:tp2 256 tokens",
        "colocated:tp2 512 tokens",
    ]
    assert [o.parameters for o in pair.options] == [
        ("token_budget = 256: given",),
        ("token_budget = 512: given",),
    ]


def made_up(system, *per_seed_rps):
    return SystemResult(
        system=system,
        colocated=system != DISAGGREGATED,
        deployment="-",
        parameters=(),
        per_seed_rps=per_seed_rps,
        needs=0.5,
        num_requests=1,
        candidates=(),
    )


def test_one_token_each_way_ends_and_says_what_was_bounded(tmp_path):
    """Requests/s times a target have no end; the runs do."""
    cells = lengths_map((1,), (1, 2), 0, SLO(ttft_s=5.0, tpot_s=5.0), 64)
    spec = linear_spec(num_requests=20, max_requests=80)
    for at, cell in cells.cells.items():
        for one in system_searches(spec, cell):
            assert one.needed_requests > 80, at
            sizes = {o.candidate.search.num_requests for o in one.options}
            assert sizes == {80}
    said = []
    grids = compare(spec, [cells], map, lambda *step: said.append(step))
    shown = text(spec, [cells], grids)
    assert "Bounded: in 2 of 2 cells runs have 80 requests" in shown
    assert " 80 of " in shown
    part = "goodputs (2 cells x 2 systems)"
    assert [step[:3] for step in said] == [(part, done, 4) for done in range(5)]
    assert said[1][3].startswith("vllm_v0 ")
    (found,) = record(spec, [cells], grids)["maps"]
    assert [cell["bounded"] for cell in found["cells"]] == [True, True]
    assert found["sentence"] in shown and "--max_requests" in found["sentence"]
    assert all(cell["num_requests"] == 80 for cell in found["cells"])
    plot(spec, [cells], grids, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 1000


@pytest.mark.parametrize("slo", [(math.inf, 0.1), (1.0, math.inf), (math.inf,) * 2])
def test_no_target_at_all_is_bounded_too(slo):
    cell = Cell(
        workload=get_workload("fixed:8x4"), slo=SLO(ttft_s=slo[0], tpot_s=slo[1])
    )
    for one in system_searches(linear_spec(max_requests=400), cell):
        assert one.needed_requests == math.inf
        sizes = {o.candidate.search.num_requests for o in one.options}
        assert sizes == {400}


def test_a_cell_that_needs_less_is_not_bounded():
    cell = Cell(workload=get_workload("fixed:400x4"), slo=SLO(ttft_s=1.0, tpot_s=0.1))
    (few, many) = (
        system_searches(linear_spec(max_requests=most), cell)
        for most in (4000, 100_000)
    )
    for a, b in zip(few, many, strict=True):
        assert a.needed_requests == b.needed_requests <= 4000
        sizes = {o.candidate.search.num_requests for o in (*a.options, *b.options)}
        assert sizes == {math.ceil(a.needed_requests)}


def test_a_bound_below_the_least_is_refused():
    with pytest.raises(ValueError, match=r"max_requests: expected >= num_requests"):
        linear_spec(num_requests=50, max_requests=49)


def test_the_kinds_are_compared_and_not_only_the_first_two():
    # Two colocated systems are first; the spec is disaggregation's place.
    found = [
        made_up("vllm_v0", 2.0, 2.2, 2.4),
        made_up("orca", 2.0, 2.2, 2.4),
        made_up(DISAGGREGATED, 1.0, 1.1, 1.2),
    ]
    cell = judge(found)
    assert cell.verdict == COLOCATED and not cell.over_runner_up.clear
    assert cell.over.ratio.mean == pytest.approx(0.5)
    even = judge([made_up("vllm_v0", 2.0, 1.0), made_up(DISAGGREGATED, 1.0, 2.1)])
    assert even.verdict == UNCLEAR and even.winner.system == DISAGGREGATED


# ---- any system beside any other -----------------------------------------------------

OWN = {Role.COLOCATED: RunningFirst(max_seqs=4)}
OWN_APART = {Role.PREFILL: PrefillOnly(), Role.DECODE: DecodeOnly(max_seqs=4)}


@pytest.mark.parametrize(
    ("systems", "two_kinds"),
    [
        (of("vllm_v0", "orca"), False),
        (of("sarathi", "splitfuse"), False),
        (of(DISAGGREGATED, "disaggregated_chunked"), False),
        ({**of("vllm_v1"), "mine:own": OWN}, False),
        ({"mine:apart": OWN_APART, **of(DISAGGREGATED)}, False),
        ({"mine:own": OWN, "mine:apart": OWN_APART}, True),
        (of("vllm_v1", "disaggregated_chunked"), True),
    ],
)
def test_two_systems_of_any_kind_are_compared(systems, two_kinds, tmp_path):
    spec = linear_spec(systems=systems, num_requests=20, max_requests=20)
    each = slos_map([0.5], [0.1], hundred(3), "100 tokens")
    (grid,) = compare(spec, [each], map, silent)
    cell = judge(grid[0, 0])
    assert cell.two_kinds == spec.two_kinds == two_kinds
    assert {one.system for one in cell.pair} == set(systems)
    assert all(one.rps > 0 for one in cell.pair)
    shown = text(spec, [each], [grid])
    assert ("disaggregated / best colocated" in shown) == two_kinds
    json.dumps(record(spec, [each], [grid]), allow_nan=False)
    plot(spec, [each], [grid], tmp_path / "maps.png")


def test_of_two_colocated_systems_the_one_that_does_not_stall_wins():
    # 10 gaps of 10 ms and a stall of 0.1 s for a whole prompt are 20 ms a token, two
    # stalls 30 ms. A step of 15 tokens, with a decode, takes 24 ms at most.
    slo = SLO(ttft_s=0.9, tpot_s=0.025)
    spec = linear_spec(systems=of("vllm_v0", "vllm_v1"), sizes=(15,), devices=1)
    found = system_searches(spec, Cell(workload=hundred(11), slo=slo))
    cell = judge([search_system(each) for each in found])
    assert cell.verdict == cell.winner.system == "vllm_v1"
    assert [one.system for one in cell.pair] == ["vllm_v1", "vllm_v0"]
    assert cell.over == cell.over_runner_up and cell.over.ratio.low > 1


def test_of_one_kind_the_two_best_are_the_pair():
    found = [made_up(n, rps, rps + 0.1) for n, rps in (("a", 1), ("b", 3), ("c", 2))]
    cell = judge(found)
    assert [one.system for one in cell.pair] == ["b", "c"]
    assert (cell.verdict, cell.two_kinds) == ("b", False)
    assert judge([made_up("a", 1.0, 2.0), made_up("b", 2.0, 1.1)]).verdict == UNCLEAR
    assert judge([made_up("a", 0.0), made_up("b", 0.0)]).verdict == INFEASIBLE


def test_a_system_may_have_a_deployment_of_its_own():
    placed = {"vllm_v0": Deployment.parse("colocated:tp2")}
    spec = small_spec(systems=of("vllm_v0", "orca"), placed=placed)
    assert [str(d) for d in spec.deployments("vllm_v0")] == ["colocated:tp2"]
    assert [str(d) for d in spec.deployments("orca")] == [
        *("2xcolocated:tp1", "colocated:tp2")
    ]
    cell = Cell(workload=get_workload("fixed:512x64"), slo=SLO(ttft_s=1.0, tpot_s=0.1))
    (vllm, orca) = system_searches(spec, cell)
    assert [o.candidate.name for o in vllm.options] == ["colocated:tp2"]
    assert len(orca.options) == 2


def test_by_default_all_systems_are_compared_but_those_that_must_be_asked_for():
    asked_for = {"disaggregated_chunked", "tensorrt_llm"}
    assert set(KNOWN) - set(POLICIES) == set(SYSTEMS) - set(PLACED) == asked_for
    assert list(asked_systems(["tensorrt_llm"], [], ())) == ["tensorrt_llm"]


@pytest.mark.parametrize("name", KNOWN)
def test_set_is_of_a_system_that_is_named(name):
    role = next(iter(KNOWN[name]))
    changes = [
        f"systems.{name}.deployment=colocated:tp1",
        f"systems.{name}.policies.{role}.max_seqs=7",
    ]
    found = asked_systems([name, "vllm_v0"], changes, ())
    assert found[name].deployment == "colocated:tp1"
    assert found[name].policies[role].max_seqs == 7
    assert found["vllm_v0"].policies == KNOWN["vllm_v0"] or name == "vllm_v0"


STEP = "systems.vllm_v1.policies.colocated.max_batched_tokens=512"


@pytest.mark.parametrize(
    ("names", "changes", "budgets", "message"),
    [
        (["nobody"], [], (), "system: expected one of .*'vllm_v1'.* got 'nobody'"),
        (["orca"], ["systems.vllm_v1.deployment=x"], (), "no 'vllm_v1' here; .* orca"),
        (["orca"], ["workload=x"], (), "no 'workload' here; expected one of systems"),
        (["orca"], ["systems"], (), "expected key=value, got 'systems'"),
        (
            ["vllm_v1"],
            [STEP],
            (),
            "expected --budgets=512, got the paper's rule, where",
        ),
        (["vllm_v1"], [STEP], (64,), "expected --budgets=512, got --budgets=64, where"),
    ],
)
def test_a_bad_name_or_setting_says_what_was_expected(names, changes, budgets, message):
    with pytest.raises(ValueError, match=message):
        asked_systems(names, changes, budgets)


def test_a_step_size_without_a_rule_can_be_set():
    change = "systems.vllm_v0.policies.colocated.max_batched_tokens=512"
    found = asked_systems(["vllm_v0"], [change], ())
    assert found["vllm_v0"].policies[Role.COLOCATED].max_batched_tokens == 512
    with pytest.raises(ValueError, match="expected --budgets=512, got --budgets=64"):
        asked_systems(["vllm_v0"], [change], (64,))


# ---- when ----------------------------------------------------------------------------

LETTERS = {"d": DISAGGREGATED, "c": COLOCATED, "?": UNCLEAR, "-": INFEASIBLE}


def verdicts(*rows):
    """From rows of letters, the highest y first."""
    return {
        (i, j): LETTERS[letter]
        for j, row in enumerate(reversed(rows))
        for i, letter in enumerate(row)
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (("dd", "cc"), "mean prompt <= 20 tokens"),
        (("cd", "cd"), "mean output <= 2 tokens"),
        (("cc", "cc"), "any mean output and mean prompt that was tried"),
        (("cd", "-c"), "mean output <= 2 tokens; nor with mean prompt <= 20 tokens"),
        (("?c", "?d"), "mean output >= 4 tokens and mean prompt >= 30 tokens"),
    ],
)
def test_the_sentence_says_which_cells(rows, expected):
    each = Map(
        name="lengths",
        fixed="SLO",
        x=Axis(name="mean output", unit="tokens", values=(2.0, 4.0)),
        y=Axis(name="mean prompt", unit="tokens", values=(20.0, 30.0)),
        cells={},
    )
    said = sentence(each, verdicts(*rows))
    assert said.startswith(f"Do not disaggregate with {expected} (of 4 cells, SLO: ")


def test_the_sentence_counts_all_cells():
    each = slos_map([0.1, 0.2], [0.01], get_workload("fixed:8x8"), "fixed:8x8")
    assert sentence(each, verdicts("d-")) == (
        "No cell says not to disaggregate (of 2 cells, workload fixed:8x8: "
        "disaggregated 1, colocated 0, no clear winner 0, infeasible 1)."
    )


def test_rectangles_cover_all_that_is_wanted_and_nothing_else():
    table = verdicts("ccd?", "ccc-", "d?cc")
    covered = set()
    for rectangle in regions(table, COLOCATED):
        cells = set(itertools.product(*rectangle))
        assert {table[at] for at in cells} <= {COLOCATED, INFEASIBLE}
        covered |= cells
    assert {at for at, verdict in table.items() if verdict == COLOCATED} <= covered
    assert regions(verdicts("d?"), COLOCATED) == []


# ---- questions that make no sense ----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": of("orca")}, "systems: expected two or more, got ..orca"),
        (
            {"systems": {**of("orca"), "half": {Role.DECODE: DecodeOnly()}}},
            "systems.half: expected policies for colocated, or for prefill and decode",
        ),
        (
            {"placed": {"orca": Deployment.parse("prefill:tp1,decode:tp1")}},
            "systems.orca.deployment: expected instances of colocated only, got 'pre",
        ),
        (
            {"placed": {"orca": Deployment.parse("3xcolocated:tp1")}},
            "systems.orca.deployment: expected 2 devices, as all systems have, got '3x",
        ),
        ({"devices": 0}, "devices: expected >= 1, got 0"),
        ({"devices": 1}, "devices: expected enough for two instances of opt-13b"),
        ({"looks": ()}, "seeds: expected 1 to 3 numbers that rise from above 0, got"),
        ({"looks": (4, 4)}, "seeds: expected 1 to 3 numbers that rise from above 0"),
        ({"looks": (1, 2, 3, 4)}, "seeds: expected 1 to 3 numbers that rise"),
        ({"budgets": (0,)}, "budgets: expected >= 1"),
        (
            {"simulation": get_simulation("opt175b_a100"), "devices": 5},
            "devices: expected enough for two instances of opt-175b .*weights alone",
        ),
        (
            {"simulation": get_simulation("simdistserve_opt13b")},
            "config: expected one cost model",
        ),
    ],
)
def test_bad_questions(changes, message):
    with pytest.raises(ValueError, match=message):
        small_spec(**changes)


def test_bad_maps():
    slo = SLO(ttft_s=1.0, tpot_s=0.1)
    with pytest.raises(ValueError, match="mean prompt: expected one or more values"):
        lengths_map([], [8], 0.5, slo, 100)
    with pytest.raises(ValueError, match="mean output: expected one or more values"):
        lengths_map([8], [8, 8], 0.5, slo, 100)
    with pytest.raises(ValueError, match="TTFT target: .* rise from above 0"):
        slos_map([0.0], [0.1], get_workload("fixed:8x8"), "fixed:8x8")
    with pytest.raises(ValueError, match="expected 100 tokens together at most"):
        lengths_map([96], [8], 0.5, slo, 100)
    with pytest.raises(ValueError, match="model: expected one of"):
        Simulation.of("opt-14b", "h100", max_context=100)


# ---- all of it -----------------------------------------------------------------------


def test_a_map_from_end_to_end():
    # One device of two prefills in a pair: see above. A prompt takes 0.1 s.
    spec = linear_spec(num_requests=60)
    each = slos_map([0.05, 0.5], [1.0], hundred(1), "100 tokens")
    (grid,) = compare(spec, [each], map, silent)
    assert {at: judge(found).verdict for at, found in grid.items()} == {
        (0, 0): INFEASIBLE,
        (1, 0): COLOCATED,
    }
    shown = text(spec, [each], [grid])
    said = "Do not disaggregate with any TTFT target and TPOT target that was tried (of"
    assert said in shown
    assert "token_budget = 100: a prompt of it saturates the device" in shown
    content = json.loads(json.dumps(record(spec, [each], [grid]), allow_nan=False))
    (made,) = content["maps"]
    assert [cell["verdict"] for cell in made["cells"]] == [INFEASIBLE, COLOCATED]
    assert [cell["winner"] for cell in made["cells"]] == [None, "vllm_v0"]


def command(*arguments):
    return run_command("compare_systems", *arguments)


def test_the_command_writes_a_table_a_picture_and_json(tmp_path):
    done = command(
        *("--model=opt-13b", "--devices=2", "--systems=vllm_v0,disaggregated"),
        *("--set", "systems.vllm_v0.deployment=colocated:tp2"),
        *("--map=targets", "--ttfts=0.01,0.5", "--tpots=0.05", "--seeds=2"),
        *("--workload=fixed:512x8", "--num_requests=20", "--workers=1"),
        f"--out={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "maps.txt").read_text()
    assert shown in done.stdout + "\n" and "with 1 workers" in done.stdout
    assert "infeasible: even alone vllm_v0 needs" in shown
    assert (
        "2 seeds; 95 %" in shown and "max_batched_tokens = 2048: the default" in shown
    )
    assert "4/4 goodputs (2 cells x 2 systems)" in done.stderr
    content = MAPS.read(json.loads((tmp_path / "maps.json").read_text()))
    assert content["flags"]["ttfts"] == ["0.01", "0.5"]
    assert "  vllm_v0        colocated:tp2: " in shown
    assert content["environment"]["commit"] and content["wall_s"] > 0
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_the_time_that_is_spent_leaves_cells_out_and_says_so(tmp_path):
    done = command(
        *("--model=opt-13b", "--devices=2", "--systems=vllm_v0,disaggregated"),
        *("--map=targets", "--ttfts=0.4,0.5", "--tpots=0.05", "--seeds=2,3"),
        *("--workload=fixed:512x8", "--num_requests=20", "--workers=1"),
        *("--minutes=0.0001", f"--out={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    said = "Left out, as the time of --minutes was spent: 1 of 2 cells of the map targe"
    assert last.startswith(said)
    content = json.loads((tmp_path / "maps.json").read_text())
    assert len(content["maps"][0]["cells"]) == 1 and content["left_out"]


def test_a_bad_flag_is_one_line():
    done = command("--config=opt13b_a100", "--model=opt-13b", "--workers=1")
    assert done.returncode == 1
    assert "error: --model: expected no --config, got --config=opt" in done.stderr
    assert "Traceback" not in done.stderr


def test_lists_of_numbers():
    assert numbers("prompts", ["8", "16"], int) == (8, 16)
    expected = "prompts: expected numbers joined by commas, got '8,long'"
    with pytest.raises(ValueError, match=expected):
        numbers("prompts", ["8", "long"], int)


# ---- a single cell -------------------------------------------------------------------


def found_of(system, *per_seed_rps, needs=0.5):
    return SystemResult(
        system=system,
        colocated=system != DISAGGREGATED,
        deployment="2xcolocated:tp1",
        parameters=(),
        per_seed_rps=per_seed_rps,
        needs=needs,
        num_requests=100,
        candidates=({"steady": True, "bracketed": True, "resolved": True},),
    )


def test_a_winner_whose_attainment_is_not_monotone_says_so():
    one = found_of("vllm_v0", 2.0, 2.0)
    best = {**one.candidates[0], "inversion": "46.0% at 10, 98.0% at 100"}
    cell = [
        dataclasses.replace(one, candidates=(best,)),
        found_of(DISAGGREGATED, 1.0, 1.0),
    ]
    assert answer(cell).endswith("\nvllm_v0: 46.0% at 10, 98.0% at 100.")


@pytest.mark.parametrize(
    ("disaggregated", "colocated", "said"),
    [
        ((2.0, 2.02, 1.98), (1.0, 1.0, 1.0), "2.00 [1.95, 2.05]: disaggregate."),
        ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), "0.50 [0.50, 0.50]: do not disaggregate."),
        (
            (1.0, 2.0, 1.5),
            (1.5, 1.6, 1.4),
            # Logarithms of the ratios: -0.405, 0.223, 0.069. Their mean is -0.038, and
            # half of the interval 0.812, so 3 x (0.812 / 0.038)^2 seeds and more.
            ": no clear winner. After 3 seeds, even 1000 would probably not tell.",
        ),
        (
            (1.0, 2.0, 1.5),
            (1.2, 1.2, 1.2),
            # -0.182, 0.511 and 0.223: 0.184 and 0.865, so 3 x 22.2 = 66.5.
            ": no clear winner. After 3 seeds, about 67 would probably tell.",
        ),
        ((2.0, 2.0, 2.0), (0.0, 0.0, 0.0), "not both meet the targets: disaggregate."),
    ],
)
def test_the_answer_of_a_cell(disaggregated, colocated, said):
    cell = [found_of("vllm_v0", *colocated), found_of(DISAGGREGATED, *disaggregated)]
    text = answer(cell)
    assert text.endswith(said)
    better = DISAGGREGATED if sum(disaggregated) > sum(colocated) else "vllm_v0"
    assert text.startswith(f"{better} (2xcolocated:tp1) serves the most: ")


def test_the_answer_of_a_cell_that_nobody_can_serve():
    cell = [found_of(n, 0.0, needs=3.0) for n in ("vllm_v0", DISAGGREGATED)]
    assert answer(cell) == "Nobody: even alone vllm_v0 needs 3 x the targets."


def test_without_independent_seeds_there_is_no_interval_and_no_winner():
    clear = [
        found_of("vllm_v0", 1.0, 1.1, 1.05),
        found_of(DISAGGREGATED, 2.0, 2.1, 2.2),
    ]
    assert judge(clear).verdict == DISAGGREGATED
    shared = [dataclasses.replace(one, why_dependent="rows are few") for one in clear]
    assert judge(shared).verdict == UNCLEAR
    assert answer(shared) == (
        "disaggregated (2xcolocated:tp1) serves the most: 2.1 requests/s per device.\n"
        "Disaggregated over vllm_v0, the best colocated system: 2.00: no clear winner. "
        "No interval: rows are few."
    )


def test_a_goodput_does_not_begin_below_0():
    assert found_of("vllm_v0", 1.0, 0.0, 0.0).goodput.low == 0.0


def test_a_single_cell_from_a_trace_and_files(tmp_path):
    (tmp_path / "mine.json").write_text(
        json.dumps(
            {  # so large that a queue is long after few requests
                **{"layers": 32, "embed": 4096, "q_heads": 32, "kv_heads": 8},
                **{"mlp": 14336, "head_dim": 128, "gated_mlp": True, "vocab": 1000},
                "tie_embeddings": True,
            }
        )
    )
    rows = [f"{i},{100 + i},{4 + i % 3}" for i in range(60)]
    rows.append("60,9000,5")  # too long
    head = "arrival_s,prompt_tokens,output_tokens"
    (tmp_path / "trace.csv").write_text("\n".join([head, *rows]) + "\n")
    done = command(
        *("--map=targets", "--ttfts=0.05", "--tpots=0.02", "--devices=2", "--seeds=2"),
        *("--num_requests=40", "--systems=vllm_v0,disaggregated", "--workers=1"),
        *(f"--model={tmp_path}/mine.json", f"--trace={tmp_path}/trace.csv"),
        f"--out={tmp_path}/out",
    )
    assert done.returncode == 0, done.stderr
    said = [
        f"trace {tmp_path}/trace.csv: columns format, 61 rows, times in s",
        "1 of 61 rows are left out: over 8192 tokens",
        "the trace's own rate: 1 requests/s",
    ]
    assert all(f"\n{line}\n" in done.stdout for line in said)
    assert "Warning" not in done.stderr
    assert "mine on 2 devices" in done.stdout
    assert "Disaggregated over vllm_v0, the best colocated system: " in done.stdout
    content = json.loads((tmp_path / "out" / "maps.json").read_text())
    (made,) = content["maps"]
    assert made["sentence"] in done.stdout
    *notes, why = made["notes"]
    assert notes == said and why.startswith("no interval: 2 runs x")
    assert why in done.stdout and " share the 60 rows of the trace that fit, so " in why
    (cell,) = made["cells"]
    assert cell["verdict"] == UNCLEAR
    assert all(one["goodput"]["low"] is None for one in cell["systems"])
    assert all(not one["candidates"][0]["resolved"] for one in cell["systems"])
    assert content["flags"]["trace"] == f"{tmp_path}/trace.csv"
    assert "\nall layouts that were tried; " in done.stdout
    last = done.stdout.splitlines()[-1]
    need = "devices needed: vllm_v0 1, disaggregated 2."
    assert last == f"For 1 requests/s, the trace's own rate, {need}"
    served = content["served"]
    assert served["demand"]["num_requests"] == 60 and served["own_rate"]
    assert [one["best"]["attainment"] for one in served["systems"]] == [1.0, 1.0]
    for name in ("maps", "lengths"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000


# ---- engines -------------------------------------------------------------------------


def test_systems_have_the_limits_of_an_engine_but_for_what_is_set():
    engine = get_engine("vllm")
    assignments = ["systems.orca.policies.colocated.max_seqs=3"]
    found = asked_systems(["vllm_v0", "orca", DISAGGREGATED], assignments, [], engine)
    vllm, orca = (found[n].policies[Role.COLOCATED] for n in ("vllm_v0", "orca"))
    limits = engine.token_budget, engine.max_seqs
    assert (vllm.max_batched_tokens, vllm.max_seqs) == limits
    assert (orca.max_batched_tokens, orca.max_seqs) == (engine.token_budget, 3)
    assert found[DISAGGREGATED].policies[Role.DECODE].max_seqs == engine.max_seqs


def test_the_engines_own_system_takes_part():
    def systems(*words):
        compare_systems.FLAGS.values(["compare_systems", "--hardware=h100", *words])
        found = list(compare_systems._spec().systems)
        compare_systems.FLAGS.values.unparse_flags()
        return found

    usual, engines = systems(), systems("--engine=trtllm")
    assert "tensorrt_llm" not in usual and engines == [*usual, "tensorrt_llm"]
    assert systems("--engine=vllm") == usual  # its vllm_v1 is among them


def test_a_step_is_tuned_for_each_attention_replica():
    """Two replicas of two devices: a step has the tokens of both, and so their time."""
    simulation = Simulation.of("mixtral-8x7b", "h200", engine="vllm")
    spec = ComparisonSpec(
        simulation=simulation,
        devices=4,
        systems=of("sarathi_serve", "vllm_v1"),
        placed={"sarathi_serve": Deployment.parse("colocated:tp2dp2ep4")},
        sizes=(128, 256, 8192),
        num_requests=4,
    )
    cell = Cell(workload=hundred(50), slo=SLO(ttft_s=1, tpot_s=0.05))
    (deployment,) = spec.deployments("sarathi_serve")
    simulated, (said,) = simulate(spec, cell, "sarathi_serve", deployment)
    (policy,) = simulated.policies.values()
    size = int(said.removeprefix("token_budget = ").partition(":")[0])
    assert policy.token_budget == 2 * size
    shown_ms = float(said.rpartition(": ")[2].split()[0])
    decodes = int(size * 49 / 149)
    assert decodes <= 1024
    inputs = TuningInputs(
        step_s=lambda load: sum(simulated.cost.stages_s(0, load.times(2))),
        sizes=(size,),
        prompt_tokens=100,
        output_tokens=50,
        kv_tokens=10**9,
    )
    chunks = policy.limits.prefill_rows
    expected_s = inputs.step_s(inputs.mixed(size, 1024, chunks))
    assert shown_ms == pytest.approx(1e3 * expected_s, rel=0.01)


def test_the_command_says_the_engine_and_its_error_once(tmp_path):
    done = command(
        *("--map=targets", "--ttfts=0.5", "--tpots=0.05", "--hardware=h100"),
        *("--workload=fixed:512x16", "--systems=vllm_v0,orca", "--devices=1"),
        *("--num_requests=20", "--max_requests=20", "--seeds=2", "--workers=1"),
        *("--engine=vllm", f"--out={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    said = get_engine("vllm").checked("llama-3-8b", "h100", "bf16")
    assert done.stdout.count(said) == 1
    assert "at most: vllm_v0 1024, orca 1024;" in done.stdout
    assert json.loads((tmp_path / "maps.json").read_text())["checked"] == said
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"]["engine"] == config["engine"]["name"] == "vllm"
    assert config["engine"]["token_budget"] == 8192
