"""Trace files with their errors, and the requests made of them."""

from pathlib import Path

import pytest

from disagg_jax import traces
from disagg_jax.traces import TraceRow


def column(requests, name):
    return [getattr(request, name) for request in requests]


ROWS = [
    TraceRow(3.0, 100, 10),
    TraceRow(4.0, 100, 0),  # nothing to generate
    TraceRow(5.0, 900, 10),  # prompt too long for 500
    TraceRow(6.0, 500, 30),  # output too long for 20
    TraceRow(7.0, 200, 20),
]


class TestRequestsFromTrace:
    def make(self, rows=ROWS, **changes):
        return traces.requests_from_trace(rows, seed=0, **changes)

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
        assert traces.read_azure(path) == [
            TraceRow(0.0, 374, 44),
            TraceRow(1.500001, 5, 0),
        ]
        assert traces.read_trace(path) == traces.read_azure(path)

    def test_azure_2024_with_time_zone(self, tmp_path):
        path = tmp_path / "trace.csv"
        rows = f"{DAY} 01:00:00+00:00,1,2\r\n{DAY} 02:00:00.5+01:00,3,4\r\n"
        path.write_bytes((HEADER.strip() + "\r\n" + rows).encode())
        assert traces.read_azure(path)[1] == TraceRow(0.5, 3, 4)

    def test_mooncake(self, tmp_path):
        path = tmp_path / "trace.jsonl"
        path.write_text(
            '{"timestamp": 27, "input_length": 6, "output_length": 5, "hash_ids": []}\n'
            "\n"
            '{"timestamp": 527.5, "input_length": 7, "output_length": 1}\n',
            encoding="utf-8",
        )
        rows = [TraceRow(0.0, 6, 5), TraceRow(0.5005, 7, 1)]  # ms from the first row
        assert traces.read_mooncake(path) == rows
        assert traces.read_trace(path) == rows

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
            traces.read_trace(path)

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
            traces.read_trace(path)

    def test_long_lines_are_cut_in_messages(self, tmp_path):
        path = tmp_path / "trace.jsonl"
        path.write_text('{"hash_ids": [' + "1, " * 10_000 + "1]}", encoding="utf-8")
        with pytest.raises(ValueError, match=r"got .*\.\.\.$") as error:
            traces.read_trace(path)
        assert len(str(error.value)) < 400 + len(str(path))

    @pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.csv", HEADER)])
    def test_no_rows(self, tmp_path, name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{name}: expected at least one row"):
            traces.read_trace(path)

    def test_unknown_extension(self):
        with pytest.raises(ValueError, match="'.csv', '.jsonl'.* got '.parquet'"):
            traces.read_trace("trace.parquet")


def real_trace(shared_dir: Path, name: str) -> list[TraceRow]:
    path = shared_dir / "traces" / name
    if not path.is_file():
        pytest.skip(f"no reference data: {path} is missing")
    return traces.read_trace(path)


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
        made = traces.requests_from_trace(rows, seed=0, rate_rps=2.0)
        assert (made.dropped_empty, made.dropped_long) == (0, 0)
        assert made.requests[-1].arrival_s == pytest.approx(19365 / 2)  # rounding

    def test_mooncake(self, shared_dir):
        rows = real_trace(shared_dir, "mooncake/synthetic_trace.jsonl")
        assert len(rows) == 3993
        assert rows[0] == TraceRow(0.0, 40160, 6)
        assert rows[-1].arrival_s == 1022.025
        assert max(row.prompt_tokens for row in rows) == 191378
        assert min(row.output_tokens for row in rows) == 1
