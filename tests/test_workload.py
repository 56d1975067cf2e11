"""Distributions, common random numbers, and traces with their errors."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from disagg_jax import workload
from disagg_jax.request import Sampling
from disagg_jax.workload import (
    Arrivals,
    FixedLengths,
    HistogramLengths,
    LognormalLengths,
    TraceRow,
    UniformLengths,
)

N = 40_000  # draws for moments: the mean of unit-variance draws is good to 0.5 %


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class TestArrivals:
    @pytest.mark.parametrize(
        ("arrivals", "variation"),
        [
            (Arrivals(kind="poisson"), 1.0),
            (Arrivals(kind="gamma", burstiness=0.25), 2.0),  # 1 / sqrt(shape)
            (Arrivals(kind="gamma", burstiness=4.0), 0.5),
        ],
    )
    def test_gaps(self, arrivals, variation):
        gaps_s = np.diff(arrivals.times_s(N, 5.0, rng()), prepend=0)
        assert gaps_s.min() >= 0
        # Standard errors: of the mean at most 2 / sqrt(N) = 1 %; of the deviation, for
        # the heaviest tail here (kurtosis 27), sqrt(26 / 4 N) = 1.3 %. Three of them.
        assert gaps_s.mean() == pytest.approx(1 / 5, rel=0.03)
        assert gaps_s.std() == pytest.approx(variation / 5, rel=0.04)

    def test_poisson_gaps_are_exponential(self):
        gaps_s = np.diff(Arrivals().times_s(N, 1.0, rng()), prepend=0)
        # P(gap > 1) = 1/e; standard error sqrt(.37 * .63 / N) = 0.24 %.
        assert (gaps_s > 1).mean() == pytest.approx(math.exp(-1), abs=0.01)

    def test_fixed(self):
        times_s = Arrivals(kind="fixed").times_s(3, 4.0, rng())
        assert times_s.tolist() == [0.25, 0.5, 0.75]  # the first after one gap

    def test_infinite_rate_is_a_burst(self):
        assert Arrivals().times_s(3, math.inf, rng()).tolist() == [0, 0, 0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "uniform"}, "expected one of .*got 'uniform'"),
            ({"kind": "gamma", "burstiness": 0}, "burstiness: expected > 0"),
            ({"kind": "gamma", "burstiness": math.nan}, "burstiness: expected > 0"),
            ({"kind": "poisson", "burstiness": 0.5}, "expected 1 unless gamma"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Arrivals(**arguments)

    @pytest.mark.parametrize("rate_rps", [0, -1, math.nan])
    def test_rate_is_positive(self, rate_rps):
        with pytest.raises(ValueError, match="rate_rps: expected > 0"):
            Arrivals().times_s(1, rate_rps, rng())

    def test_needs_a_request(self):
        with pytest.raises(ValueError, match="n: expected at least one"):
            Arrivals().times_s(0, 1.0, rng())


class TestLengths:
    def test_fixed(self):
        assert FixedLengths(tokens=9).sample(2, rng()).tolist() == [9, 9]

    def test_uniform_includes_both_ends(self):
        lengths = UniformLengths(low=3, high=6).sample(N, rng())
        values, counts = np.unique(lengths, return_counts=True)
        assert values.tolist() == [3, 4, 5, 6]
        # A share of 1/4 has a standard error of sqrt(3 / 16 N) = 0.22 %.
        assert counts / N == pytest.approx(0.25, abs=0.01)

    def test_lognormal(self):
        lengths = LognormalLengths(median=500, sigma=0.5, high=10**6).sample(N, rng())
        # Errors: median 1.25 * 0.5 / sqrt(N) = 0.3 %, deviation of the log 0.35 %.
        assert np.median(lengths) == pytest.approx(500, rel=0.01)
        assert np.log(lengths).std() == pytest.approx(0.5, rel=0.015)

    def test_lognormal_from_mean(self):
        by_mean = LognormalLengths.from_mean(mean=300, sigma=1.0, high=10**6)
        # The coefficient of variation is sqrt(e - 1) = 1.3: 0.65 % over N.
        assert by_mean.sample(N, rng()).mean() == pytest.approx(300, rel=0.02)

    def test_lognormal_is_clipped(self):
        lengths = LognormalLengths(median=10, sigma=2, low=5, high=20).sample(N, rng())
        assert (lengths.min(), lengths.max()) == (5, 20)

    def test_histogram(self):
        histogram = HistogramLengths(edges=(0, 2, 10, 11, 20), weights=(1, 0, 3, 0))
        values, counts = np.unique(histogram.sample(N, rng()), return_counts=True)
        # The first bin holds 0 and 1, and 0 becomes 1; empty bins stay empty; [10, 11)
        # is 10 alone. The share's standard error is 0.22 %.
        assert values.tolist() == [1, 10]
        assert counts / N == pytest.approx([0.25, 0.75], abs=0.01)

    def test_histogram_is_uniform_within_a_bin(self):
        lengths = HistogramLengths(edges=(10, 30), weights=(2,)).sample(N, rng())
        assert (lengths.min(), lengths.max()) == (10, 29)
        # 10..29: mean 19.5, deviation 5.77, so 0.03 over N.
        assert lengths.mean() == pytest.approx(19.5, abs=0.1)

    def test_figure_of_a_paper(self, shared_dir):
        """ShareGPT prompts: 40 bars of DistServe's Fig. 7, whose legend says 755.5."""
        path = shared_dir / "facts" / "fig7_hist.json"
        if not path.is_file():
            pytest.skip(f"no reference data: {path} is missing")
        figure = json.loads(path.read_text(encoding="utf-8"))
        histogram = HistogramLengths(
            edges=tuple(figure["bin_width"] * i for i in range(41)),
            weights=tuple(figure["mass"]["sharegpt_in"]),
        )
        # Deviation about 530 tokens, so 2.7 over N.
        assert histogram.sample(N, rng()).mean() == pytest.approx(755.5, abs=8)

    @pytest.mark.parametrize(
        ("kind", "arguments", "message"),
        [
            (FixedLengths, {"tokens": 0}, "expected tokens >= 1, got 0"),
            (UniformLengths, {"low": 0, "high": 3}, r"1 <= low <= high, got \(0, 3\)"),
            (UniformLengths, {"low": 4, "high": 3}, r"1 <= low <= high, got \(4, 3\)"),
            (LognormalLengths, {"median": 0, "sigma": 1, "high": 9}, "median > 0"),
            (LognormalLengths, {"median": 5, "sigma": -1, "high": 9}, "sigma >= 0"),
            (LognormalLengths, {"median": 5, "sigma": 1, "high": 0}, "low <= high"),
            (HistogramLengths, {"edges": (1, 2), "weights": (1, 1)}, "one edge more"),
            (HistogramLengths, {"edges": (1,), "weights": ()}, "one edge more"),
            (HistogramLengths, {"edges": (2, 1), "weights": (1,)}, "increase"),
            (HistogramLengths, {"edges": (-1, 1), "weights": (1,)}, "increase"),
            (HistogramLengths, {"edges": (0, 1), "weights": (0,)}, "positive, finite"),
            (
                HistogramLengths,
                {"edges": (0, 1, 2), "weights": (2, -1)},
                "weights >= 0",
            ),
        ],
    )
    def test_errors(self, kind, arguments, message):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


def make(**changes):
    arguments = {
        "n": 50,
        "rate_rps": 2.0,
        "prompt_lengths": HistogramLengths(edges=(1, 8, 64), weights=(1, 2)),
        "output_lengths": LognormalLengths(median=8, sigma=1, high=40),
        "seed": 3,
        "vocab_size": 5,
    }
    return workload.make_requests(**(arguments | changes))


def column(requests, name):
    return [getattr(request, name) for request in requests]


class TestMakeRequests:
    def test_deterministic(self):
        assert make() == make()
        assert make() != make(seed=4)

    def test_ids_follow_arrival(self):
        requests = make()
        assert column(requests, "id") == list(range(50))
        times_s = column(requests, "arrival_s")
        assert times_s == sorted(times_s) and times_s[0] > 0

    @pytest.mark.parametrize(
        "arrivals", [Arrivals(), Arrivals(kind="gamma", burstiness=0.5)]
    )
    def test_another_rate_scales_the_arrivals_only(self, arrivals):
        slow, fast = (make(rate_rps=r, arrivals=arrivals) for r in (1.0, 8.0))
        scaled = [8.0 * t for t in column(fast, "arrival_s")]  # exact: a power of two
        assert column(slow, "arrival_s") == scaled
        for name in ("prompt_tokens", "max_tokens", "prompt", "sampling"):
            assert column(slow, name) == column(fast, name)

    @pytest.mark.parametrize(
        "lengths",
        [
            UniformLengths(low=1, high=50),
            LognormalLengths(median=20, sigma=1, high=50),
            HistogramLengths(edges=(1, 8, 64), weights=(1, 2)),
        ],
    )
    def test_longer_run_begins_with_the_shorter(self, lengths):
        both = {"prompt_lengths": lengths, "output_lengths": lengths}
        arrivals = Arrivals(kind="gamma", burstiness=0.5)
        longer = make(n=51, arrivals=arrivals, **both)
        assert longer[:20] == make(n=20, arrivals=arrivals, **both)

    def test_streams_are_independent(self):
        """Other prompts leave arrivals, outputs and sampling seeds alone."""
        usual, other = make(), make(prompt_lengths=FixedLengths(tokens=3))
        for name in ("arrival_s", "max_tokens", "sampling"):
            assert column(usual, name) == column(other, name)
        same = UniformLengths(low=1, high=1000)
        requests = make(prompt_lengths=same, output_lengths=same)
        assert column(requests, "prompt_tokens") != column(requests, "max_tokens")

    def test_prompts(self):
        requests = make()
        tokens = set(itertools.chain(*column(requests, "prompt")))
        assert tokens == {0, 1, 2, 3, 4}  # all of the vocabulary, token 0 included
        assert set(column(make(vocab_size=None), "prompt")) == {None}

    def test_each_request_samples_with_its_own_seed(self):
        requests = make(sampling=Sampling(temperature=0.5, top_k=3))
        assert len({r.sampling.seed for r in requests}) == 50
        assert {(r.sampling.temperature, r.sampling.top_k) for r in requests} == {
            (0.5, 3)
        }

    def test_benchmarks_ignore_eos(self):
        assert all(column(make(), "ignore_eos"))
        request = make(ignore_eos=False, eos_token=2)[0]
        assert request.stops_at(2)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n": 0}, "n: expected at least one"),
            ({"rate_rps": -2}, "rate_rps: expected > 0 .* got -2"),
            ({"vocab_size": 0}, "vocab_size: expected >= 1, got 0"),
            ({"seed": -1}, "seed: expected >= 0, got -1"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            make(**changes)


class TestRequestsFromPrompts:
    def make(self, **changes):
        arguments = {
            "n": 5,
            "rate_rps": 2.0,
            "prompts": [(1, 2, 3), (4,)],
            "output_tokens": [10, 20],
            "seed": 3,
        }
        return workload.requests_from_prompts(**(arguments | changes))

    def test_cycles(self):
        requests = self.make()
        a, b = (1, 2, 3), (4,)
        assert column(requests, "prompt") == [a, b, a, b, a]
        assert column(requests, "prompt_tokens") == [3, 1, 3, 1, 3]
        assert column(requests, "max_tokens") == [10, 20, 10, 20, 10]

    def test_shares_arrivals_with_random_prompts(self):
        expected = column(make(n=5), "arrival_s")
        assert column(self.make(), "arrival_s") == expected

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompts": [], "output_tokens": []}, "prompts: expected at least one"),
            ({"output_tokens": [10]}, "one for each of 2 prompts, got 1"),
            ({"prompts": [(1,), ()]}, "prompt of at least one token"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.make(**changes)


ROWS = [
    TraceRow(3.0, 100, 10),
    TraceRow(4.0, 100, 0),  # nothing to generate
    TraceRow(5.0, 900, 10),  # prompt too long for 500
    TraceRow(6.0, 500, 30),  # output too long for 20
    TraceRow(7.0, 200, 20),
]


class TestRequestsFromTrace:
    def make(self, rows=ROWS, **changes):
        return workload.requests_from_trace(rows, seed=0, **changes)

    def test_own_times_from_zero(self):
        made = self.make()
        assert column(made.requests, "arrival_s") == [
            0,
            2,
            3,
            4,
        ]  # the empty row is out
        assert column(made.requests, "id") == [0, 1, 2, 3]
        assert (made.dropped_empty, made.dropped_long, made.clipped) == (1, 0, 0)

    def test_long_rows_are_dropped_and_counted(self):
        made = self.make(max_prompt_tokens=500, max_output_tokens=20)
        assert column(made.requests, "prompt_tokens") == [100, 200]
        assert (made.dropped_empty, made.dropped_long, made.clipped) == (1, 2, 0)

    def test_long_rows_are_clipped_and_counted(self):
        made = self.make(max_prompt_tokens=500, max_output_tokens=20, too_long="clip")
        assert column(made.requests, "prompt_tokens") == [100, 500, 500, 200]
        assert column(made.requests, "max_tokens") == [10, 10, 20, 20]
        assert (made.dropped_empty, made.dropped_long, made.clipped) == (1, 0, 2)

    def test_rate(self):
        # Four rows over 4 s are 3 gaps: 0.75 a second; at 1.5 it takes half the time.
        made = self.make(rate_rps=1.5)
        assert column(made.requests, "arrival_s") == [0, 1, 1.5, 2]

    def test_first_n(self):
        made = self.make(n=2)
        assert column(made.requests, "arrival_s") == [0, 2]
        assert made.dropped_empty == 1

    def test_prompts(self):
        (first, *_) = self.make(vocab_size=7).requests
        assert len(first.prompt) == 100 and max(first.prompt) <= 6

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n": 5}, "expected 5 rows to serve, got {'fits': 4, 'empty': 1}"),
            ({"rows": []}, "expected some rows to serve"),
            ({"n": 0}, "n: expected at least one"),
            ({"rate_rps": 0}, "rate_rps: expected > 0"),
            ({"rate_rps": 1, "n": 1}, "expected a span > 0 s, got 0"),
            ({"max_prompt_tokens": 0}, "maximum: expected >= 1 token, got 0"),
            ({"too_long": "cut"}, "expected drop or clip, got 'cut'"),
            ({"rows": ROWS[::-1]}, "rows in time order"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.make(**changes)


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
DAY = "2023-11-16"


class TestTraceFiles:
    def test_azure(self, tmp_path):
        path = tmp_path / "trace.csv"
        rows = f"{DAY} 23:59:59.5000000,374,44\n2023-11-17 00:00:01.0000017,5,0"
        path.write_text(HEADER + rows, encoding="utf-8")
        # Over midnight; 7th decimal ignored; no newline at the end; 0 tokens kept.
        assert workload.read_azure(path) == [
            TraceRow(0.0, 374, 44),
            TraceRow(1.500001, 5, 0),
        ]
        assert workload.read_trace(path) == workload.read_azure(path)

    def test_azure_2024_with_time_zone(self, tmp_path):
        path = tmp_path / "trace.csv"
        rows = f"{DAY} 01:00:00+00:00,1,2\r\n{DAY} 02:00:00.5+01:00,3,4\r\n"
        path.write_bytes((HEADER.strip() + "\r\n" + rows).encode())
        assert workload.read_azure(path)[1] == TraceRow(0.5, 3, 4)

    def test_mooncake(self, tmp_path):
        path = tmp_path / "trace.jsonl"
        path.write_text(
            '{"timestamp": 27, "input_length": 6, "output_length": 5, "hash_ids": []}\n'
            "\n"
            '{"timestamp": 527.5, "input_length": 7, "output_length": 1}\n',
            encoding="utf-8",
        )
        rows = [TraceRow(0.0, 6, 5), TraceRow(0.5005, 7, 1)]  # ms from the first row
        assert workload.read_mooncake(path) == rows
        assert workload.read_trace(path) == rows

    @pytest.mark.parametrize(
        ("text", "line", "message"),
        [
            ("TIMESTAMP,Tokens\n", 1, "the header TIMESTAMP,ContextTokens"),
            ("", 1, "the header"),
            (f"{HEADER}{DAY} 1:2:3,1,2\n", 2, "an ISO 8601 time"),
            (f"{HEADER}{DAY},1,2\n\n{DAY},x,2\n", 4, "got .*'x'"),
            (f"{HEADER}{DAY},1,-2\n", 2, "counts >= 0, got .*'-2'"),
            (f"{HEADER}{DAY},1\n", 2, "two token counts"),
            (f"{HEADER}{DAY},1,2\n2023-11-15,1,2\n", 3, "not before the row above"),
        ],
    )
    def test_azure_errors(self, tmp_path, text, line, message):
        path = tmp_path / "trace.csv"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"trace.csv, line {line}: .*{message}"):
            workload.read_trace(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{oops", "a JSON object .*got '{oops'"),
            ("[1, 2]", "a JSON object"),
            ('{"timestamp": 2, "input_length": 6}', "output_length"),
            ('{"timestamp": "2", "input_length": 6, "output_length": 1}', "numbers"),
            ('{"timestamp": NaN, "input_length": 6, "output_length": 1}', "numbers"),
            ('{"timestamp": 2, "input_length": 6.5, "output_length": 1}', "numbers"),
            ('{"timestamp": 2, "input_length": -6, "output_length": 1}', ">= 0"),
            ('{"timestamp": 0, "input_length": 6, "output_length": 1}', "above"),
        ],
    )
    def test_mooncake_errors(self, tmp_path, text, message):
        path = tmp_path / "trace.jsonl"
        good = '{"timestamp": 1, "input_length": 6, "output_length": 5}\n'
        path.write_text(good + text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"trace.jsonl, line 2: .*{message}"):
            workload.read_trace(path)

    def test_long_lines_are_cut_in_messages(self, tmp_path):
        path = tmp_path / "trace.jsonl"
        path.write_text('{"hash_ids": [' + "1, " * 10_000 + "1]}", encoding="utf-8")
        with pytest.raises(ValueError, match=r"got .*\.\.\.$") as error:
            workload.read_trace(path)
        assert len(str(error.value)) < 400 + len(str(path))

    @pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.csv", HEADER)])
    def test_no_rows(self, tmp_path, name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{name}: expected at least one row"):
            workload.read_trace(path)

    def test_unknown_extension(self):
        with pytest.raises(ValueError, match="'.csv', '.jsonl'.* got '.parquet'"):
            workload.read_trace("trace.parquet")


def real_trace(shared_dir: Path, name: str) -> list[TraceRow]:
    path = shared_dir / "traces" / name
    if not path.is_file():
        pytest.skip(f"no reference data: {path} is missing")
    return workload.read_trace(path)


class TestRealTraces:
    """First rows as they stand in the files; counts, spans found with other tools."""

    def test_azure_2023(self, shared_dir):
        rows = real_trace(shared_dir, "azure2023/AzureLLMInferenceTrace_conv.csv")
        assert len(rows) == 19366
        assert rows[:2] == [
            TraceRow(0.0, 374, 44),  # 18:15:46.680590
            TraceRow(4.314579, 396, 109),  # 18:15:50.995169
        ]
        assert rows[-1] == TraceRow(3501.721937, 197, 183)
        made = workload.requests_from_trace(rows, seed=0, rate_rps=2.0)
        assert (made.dropped_empty, made.dropped_long) == (0, 0)
        assert made.requests[-1].arrival_s == pytest.approx(19365 / 2)  # rounding

    def test_mooncake(self, shared_dir):
        rows = real_trace(shared_dir, "mooncake/synthetic_trace.jsonl")
        assert len(rows) == 3993
        assert rows[0] == TraceRow(0.0, 40160, 6)
        assert rows[-1].arrival_s == 1022.025
        assert max(row.prompt_tokens for row in rows) == 191378
        assert min(row.output_tokens for row in rows) == 1
