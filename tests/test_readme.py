"""The examples of the documents run as they are printed."""

import pathlib
import re

import pytest

from tests import snippets

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = {
    title: examples
    for name in ("README.md", "disagg_jax/README.md")
    for title, examples in snippets.sections(ROOT / name).items()
}
# What the examples of a section print.
PRINTED = {
    "Generate text": r"(?ms)^def read\(self\):.* Stages\(prefill_queue_s=.*^[01] '",
    "Simulate": r"goodput [\d.]+ requests/s, 95 % interval [\d.]+ to [\d.]+ \(3 seeds",
    "Add a system": r"vllm_v0: mean TTFT [\d.]+ s\nmy_systems:mine: mean TTFT [\d.]+ s",
    "Add a router": r"least_loaded: .* [\d.]+ s\nmy_routers:most_free: .* [\d.]+ s",
    "Add a model": r"qwen3-0.6b: \d+ tokens .*\nmine: \d+ tokens of KV beside",
    # 400 tokens on two devices take 10 ms and 10; then 10 ms a token, and the transfer.
    "Add a cost model": r"TTFT 20.0 ms, TPOT 10.0 ms",
}


def test_there_is_an_example_of_each_kind():
    assert set(EXAMPLES) == set(PRINTED)


@pytest.mark.parametrize("title", EXAMPLES)
def test_it_has_twelve_lines_at_most(title):
    assert max(len(snippets.lines(each)) for each in EXAMPLES[title]) <= 12


@pytest.mark.jax
@pytest.mark.parametrize("title", EXAMPLES)
def test_it_runs_as_it_is_printed(title, tmp_path):
    printed = snippets.run(EXAMPLES[title], tmp_path, ROOT)
    assert re.search(PRINTED[title], printed), printed
