"""Two runs side by side: what differs, and what their goodputs say."""

import json
import math
import re

import pytest
import scipy.stats

from disagg_jax.formats import STEP_TIMES
from experiments.compare_runs import compare
from experiments.runs.run_dir import RunDir
from experiments.runs.saved_run import SavedRun
from tests.commands import run_command

WORKLOAD = {"source": "random", "num_requests": 100}
CONFIG = {"seed": 3, "workload": WORKLOAD, "model": "tiny", "memory": {"blocks": 9}}


def summary(goodputs, **changes):
    """Of systems by name; a goodput for each seed."""
    systems = {
        name: {"goodput": {"per_seed_rps_per_device": values}}
        for name, values in goodputs.items()
    }
    found = {
        "criterion": "distserve",
        "target": 0.9,
        "slo": {"ttft_s": 0.2, "tpot_s": 0.01},
        "confidence": 0.95,
        "systems": systems,
    }
    return found | changes


def run(path, goodputs, config=CONFIG, seconds=None, **changes):
    run_dir = RunDir(path, config)
    run_dir.write_json("summary.json", summary(goodputs, **changes))
    if seconds:
        run_dir.write_json("step_times.json", STEP_TIMES.write({"seconds": seconds}))
    return SavedRun(path)


def row(text, name):
    """The line of a system, cells apart by a bar."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name}  "))
    return re.sub(r" {2,}", " | ", line)


def test_goodputs_of_equal_requests_are_paired_by_seed(tmp_path):
    """B is 1.1 times A at each seed, though seeds differ far more."""
    a = run(tmp_path / "a", {"vllm_v0": [10.0, 20.0, 40.0]})
    b = run(tmp_path / "b", {"vllm_v0": [11.0, 22.0, 44.0]})
    text = compare(a, b)
    assert row(text, "vllm_v0").endswith("1.100 [1.100, 1.100] | yes | paired, 3 seeds")
    assert "config: no difference" in text and "unpaired" not in text


def test_only_seeds_that_both_have_are_paired(tmp_path):
    """A has seeds 3 to 5, B 4 to 7: at 4 and 5 B has twice as much."""
    a = run(tmp_path / "a", {"vllm_v0": [9.0, 1.0, 2.0]})
    later = {**CONFIG, "seed": 4}
    b = run(tmp_path / "b", {"vllm_v0": [2.0, 4.0, 70.0, 80.0]}, config=later)
    text = compare(a, b)
    assert row(text, "vllm_v0").endswith("2.000 [2.000, 2.000] | yes | paired, 2 seeds")
    assert re.search(r"^seed +3 +4$", text, re.M)
    far = run(tmp_path / "far", {"vllm_v0": [2.0, 4.0]}, config={**CONFIG, "seed": 8})
    assert row(compare(a, far), "vllm_v0").endswith("| unpaired")


def test_goodputs_of_other_requests_are_unpaired_by_welch(tmp_path):
    ours, theirs = [3.0, 4.0, 5.0], [6.0, 7.0, 9.0, 8.0]
    a = run(tmp_path / "a", {"vllm_v0": ours})
    config = {**CONFIG, "workload": {**WORKLOAD, "num_requests": 5}}
    b = run(tmp_path / "b", {"vllm_v0": theirs}, config=config)
    text = compare(a, b)
    logs = [[math.log(value) for value in values] for values in (theirs, ours)]
    ends = scipy.stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95)
    mean = math.exp(sum(logs[0]) / 4 - sum(logs[1]) / 3)
    low, high = map(math.exp, ends)
    cells = f"{mean:.3f} [{low:.3f}, {high:.3f}] | yes | unpaired"
    assert row(text, "vllm_v0").endswith(cells)
    assert "unpaired, as requests differ: workload.num_requests" in text


@pytest.mark.parametrize(
    ("source", "key", "unpaired"),
    [
        ("random", "model", False),  # which only has other weights
        ("human_eval", "model", True),  # whose tokenizer makes other prompts
        ("random", "trace_sha256", True),
    ],
)
def test_what_requests_depend_on(tmp_path, source, key, unpaired):
    config = {**CONFIG, "workload": {**WORKLOAD, "source": source}}
    a = run(tmp_path / "a", {"vllm_v0": [1.0, 2.0]}, config=config)
    b = run(tmp_path / "b", {"vllm_v0": [1.0, 2.0]}, config={**config, key: "other"})
    assert (f"unpaired, as requests differ: {key}" in compare(a, b)) == unpaired


def test_a_system_of_one_run_has_no_ratio_and_old_names_are_found(tmp_path):
    a = run(tmp_path / "a", {"vllm": [1.0, 2.0], "orca": [1.0, 1.0]})
    b = run(tmp_path / "b", {"vllm_v0": [1.0, 2.0], "sarathi": [0.0, 1.0]})
    text = compare(a, b)
    assert row(text, "vllm").endswith("1.000 [1.000, 1.000] | no | paired, 2 seeds")
    assert row(text, "orca").endswith("| - | - | - | -")
    assert row(text, "sarathi").startswith("sarathi | - | 0.5 ")


def test_a_goodput_that_is_none_gives_no_ratio(tmp_path):
    a = run(tmp_path / "a", {"vllm_v0": [0.0, 0.0]})
    b = run(tmp_path / "b", {"vllm_v0": [1.0, 2.0]})
    assert row(compare(a, b), "vllm_v0").endswith("| - | yes | paired, 2 seeds")


@pytest.mark.parametrize(
    ("ends", "said"), [((1.5, None), ">= 1.5"), ((None, 2.5), "< 2.5")]
)
def test_a_system_that_passed_or_failed_at_every_rate_has_a_bound(tmp_path, ends, said):
    a, b = (run(tmp_path / name, {"orca": [1.0, 2.0]}) for name in "ab")
    found = summary({"orca": [1.0, 2.0]})
    passing, failing = ends
    ends = {"pass_rps_per_device": passing, "fail_rps_per_device": failing}
    found["systems"]["orca"]["goodput"] |= ends
    b.path.joinpath("summary.json").write_text(json.dumps(found))
    text = compare(a, b)
    cells = row(text, "orca").split(" | ")
    assert cells[2:] == [said, "-", "-", "a bound only"]
    assert "a bound only: >= it passed at every rate tried" in text
    assert "a bound only" not in compare(a, a)


def test_a_throughput_that_still_rose_is_a_bound(tmp_path):
    throughput = {
        "max_throughput_per_device": {"mean": 10.0},
        "per_seed_per_device": [9.0, 11.0],
    }
    sides = []
    for bracketed in (True, False):
        side = run(tmp_path / str(bracketed), {})
        found = summary({})
        of_orca = {"throughput": throughput | {"bracketed": bracketed}}
        found["systems"]["orca"] = of_orca
        side.path.joinpath("summary.json").write_text(json.dumps(found))
        sides.append(side)
    cells = row(compare(*sides), "orca").split(" | ")
    assert cells[1].startswith("10 [") and cells[2:4] == [">= 10", "-"]


def test_seeds_that_share_requests_and_looks_are_heard(tmp_path):
    """Looks ask for a higher confidence, of the interval of the ratio too."""
    wide = [run(tmp_path / n, {"orca": v}) for n, v in (("a", [1, 2]), ("b", [2, 3]))]
    looked = run(tmp_path / "looked", {"orca": [2, 3]}, confidence=0.99)
    ends = [row(compare(wide[0], b), "orca").split(" | ")[3] for b in (wide[1], looked)]
    assert ends[0] != ends[1]
    shared = run(tmp_path / "shared", {"orca": [2, 3]}, no_intervals="one trace")
    assert " | 1.732 | no | paired" in row(compare(wide[0], shared), "orca")


def test_other_targets_and_criteria_are_said(tmp_path):
    a = run(tmp_path / "a", {"orca": [1.0]})
    slo = {"ttft_s": 0.3, "tpot_s": 0.01}
    text = compare(a, run(tmp_path / "b", {"orca": [1.0]}, slo=slo))
    assert "A: SLO: TTFT <= 200.00 ms" in text and "B: SLO: TTFT <= 300.00 ms" in text
    criteria = {"sarathi": {"definition": "tokens/s"}}
    c = run(tmp_path / "c", {"orca": [1.0]}, criterion="sarathi", criteria=criteria)
    assert "no ratios: searched for by other criteria" in compare(a, c)
    targets = {"tight": summary({"orca": [1.0]})}
    run(tmp_path / "d", {}).path.joinpath("summary.json").write_text(
        json.dumps({"targets": targets})
    )
    two = SavedRun(tmp_path / "d")
    assert "goodputs: no target in both; A has [''], B has ['tight']" in compare(a, two)
    assert "\ntight SLO: TTFT" in compare(two, two)


def test_step_times_are_compared_by_program(tmp_path):
    """Ratios 0.5, 2 and 3; the median is 2."""
    a = run(tmp_path / "a", {}, seconds={"p": 2.0, "q": 1.0, "r": 1.0, "s": 1.0})
    b = run(tmp_path / "b", {}, seconds={"p": 1.0, "q": 2.0, "r": 3.0, "t": 1.0})
    text = compare(a, b)
    assert "step times, B over A: median 2.000 over 3 programs; 1 " in text
    assert "smallest 0.500: p" in text and "largest 3.000: r" in text
    assert "step times: none in B" in compare(a, run(tmp_path / "c", {}))


def test_the_environment_is_of_the_last_start(tmp_path):
    runs = [run(tmp_path / name, {}) for name in "ab"]
    starts = [{"commit": "1", "command": "x"}, {"commit": "2", "command": "y"}]
    for each, env in zip(runs, (starts, starts[:1]), strict=True):
        (each.path / "env.json").write_text(json.dumps(env))
    text = compare(*runs)
    assert re.search(r"^commit +2 +1$", text, re.M) and "command" not in text


def test_a_run_that_did_not_end_has_no_goodputs(tmp_path):
    a, b = (run(tmp_path / name, {"orca": [1.0]}) for name in "ab")
    (tmp_path / "b" / "summary.json").unlink()
    assert "no summary.json in B, whose run has not ended" in compare(a, b)
    with pytest.raises(ValueError, match="--run: expected a run directory"):
        compare(a, SavedRun(tmp_path / "none"))


def test_what_a_run_lacks_is_said(tmp_path):
    a = run(tmp_path / "a", {"orca": [1.0, 2.0]})
    b = run(tmp_path / "b", {"orca": [1.0, 2.0]}, missing=["a look", "programs"])
    assert "B is not finished: it lacks a look; programs" in compare(a, b)
    assert "A is not" not in compare(a, b)


def test_a_run_of_an_older_format_is_compared(tmp_path):
    a, b = (run(tmp_path / name, {"orca": [1.0, 2.0]}) for name in "ab")
    (tmp_path / "a" / "config.json").write_text(json.dumps(CONFIG))
    assert row(compare(a, b), "orca").endswith("paired, 2 seeds")


def test_the_command(tmp_path):
    for name in "ab":
        run(tmp_path / name, {"orca": [1.0, 2.0]})
    done = run_command("compare_runs", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    assert "paired, 2 seeds" in done.stdout
    done = run_command("compare_runs", str(tmp_path / "a"), str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: --run: expected a run directory, got ")
