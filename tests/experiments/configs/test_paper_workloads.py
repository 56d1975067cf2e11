"""The lengths carried over from papers, against the figures printed beside them."""

import statistics

import pytest

from experiments.configs.paper_workloads import get_workload

# DistServe, arXiv v3, Fig. 7: the means in the legends.
LEGENDS = [
    ("sharegpt", 755.5, 200.3),
    ("humaneval", 171.3, 98.2),
    ("longbench", 1738.3, 90.7),
]


@pytest.mark.parametrize(("name", "prompt", "output"), LEGENDS)
def test_means_are_those_of_the_figure(name, prompt, output):
    workload = get_workload(name)
    for lengths, mean in ((workload.prompt, prompt), (workload.output, output)):
        middles = [
            (a + b) / 2 for a, b in zip(lengths.edges, lengths.edges[1:], strict=False)
        ]
        drawn = statistics.fmean(middles, lengths.weights)
        # Within a bin of 51 tokens the figure says nothing: a mean is known to half.
        assert drawn == pytest.approx(mean, abs=51.175 / 2)
        assert len(lengths.weights) == 40 and lengths.edges[-1] == pytest.approx(2047)


def test_requests_fit_the_context_of_opt():
    drawn = get_workload("sharegpt").requests(2000, 1.0, seed=0)
    totals = [r.prompt_tokens + r.max_tokens for r in drawn]
    assert max(totals) == 2048  # some are cut, none is longer
    assert min(r.max_tokens for r in drawn) >= 1


def test_fixed_lengths():
    request = get_workload("fixed:512x64").requests(1, 1.0, seed=0)[0]
    assert (request.prompt_tokens, request.max_tokens) == (512, 64)


@pytest.mark.parametrize("name", ["", "alpaca", "fixed:512", "fixed:0x4", "fixed:4x-1"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="workload: expected one of"):
        get_workload(name)


def test_lengths_of_prompts_and_outputs():
    drawn = get_workload("uniform:100:200,fixed:7").requests(100, 1.0, seed=0)
    prompts = [r.prompt_tokens for r in drawn]
    assert 100 <= min(prompts) < 120 and 180 < max(prompts) <= 200
    assert {r.max_tokens for r in drawn} == {7}
    with pytest.raises(ValueError, match="lengths: expected fixed:N, uniform:LOW"):
        get_workload("uniform:100:200,7")
