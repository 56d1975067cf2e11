"""Trace files of every format, and their errors."""

import gzip
import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.workload.traces import TraceRow, load_trace
from disagg_jax.workload.traces.read import Trace

# Three requests, 2 and 2.5 s apart, as each kind of file writes them.
ROWS = [TraceRow(0.0, 521, 132), TraceRow(2.0, 676, 80), TraceRow(4.5, 90, 40)]
DAY = "2023-11-16"


def csv_text(header, *rows):
    return "\n".join([header, *rows]) + "\n"


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "azure": csv_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        f"{DAY} 23:59:59.5000000,521,132",
        "2023-11-17 00:00:01.5000000,676,80",
        "2023-11-17 00:00:04.0000000,90,40",
    ),
    "azure, with offsets": csv_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2024-05-10 00:00:00.009930+00:00,521,132",
        "2024-05-10 01:00:02.009930+01:00,676,80",
        "2024-05-10 00:00:04.509930+00:00,90,40",
    ),
    "azure 2025": csv_text(
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens",
        f"{DAY} 01:00:00,3,521,132",
        f"{DAY} 01:00:02,0,676,80",
        f"{DAY} 01:00:04.5,1,90,40",
    ),
    "burstgpt": csv_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,521,132,653,Conversation log",
        "7,GPT-4,676,80,756,API log",
        "9.5,GPT-4,90,40,130,API log",
    ),
    "burstgpt 2": csv_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,"
        "Total tokens,Log Type",
        "5,1,2.5,ChatGPT,521,132,653,Conversation log",
        "7,1,2.5,GPT-4,676,80,756,API log",
        "9.5,2,2.5,GPT-4,90,40,130,API log",
    ),
    "vidur": csv_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens,pd_ratio",
        "0.25,521,132,3.9",
        "2.25,676,80,8.4",
        "4.75,90,40,2.2",
    ),
    "splitwise-sim": csv_text(
        "request_id,request_type,application_id,arrival_timestamp,batch_size,"
        "prompt_size,token_size",
        "0,2,0,0.5,1,521,132",
        "1,2,0,2.5,1,676,80",
        "2,2,0,5.0,1,90,40",
    ),
    "mooncake": json_lines(
        {
            "timestamp": 27,
            "input_length": 521,
            "output_length": 132,
            "hash_ids": [0, 1],
        },
        {"timestamp": 2027, "input_length": 676, "output_length": 80, "hash_ids": [0]},
        {"timestamp": 4527, "input_length": 90, "output_length": 40},
    ),
    "bailian": json_lines(
        *(
            {
                "chat_id": i,
                "parent_chat_id": -1,
                "timestamp": 61.114 + row.arrival_s,
                "input_length": row.prompt_tokens,
                "output_length": row.output_tokens,
                "type": "text",
                "turn": 1,
                "hash_ids": [i],
            }
            for i, row in enumerate(ROWS)
        )
    ),
    "columns": csv_text(
        "arrival_s,prompt_tokens,output_tokens", "1,521,132", "3,676,80", "5.5,90,40"
    ),
    "columns, ms": csv_text(
        "id,arrival_ms,output_len,prompt_len",
        "a,0.5,132,521",
        "b,2000.5,80,676",
        "c,4500.5,40,90",
    ),
}


def write(tmp_path: Path, text, name="trace") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(tmp_path, text, **options) -> Trace:
    return load_trace(write(tmp_path, text), **options)


def as_is(text):
    return text.encode()


def gzipped(text):
    return gzip.compress(text.encode())


def with_crlf_and_bom(text):
    return "\r\n".join(["\ufeff" + text.split("\n")[0], *text.split("\n")[1:]]).encode()


def with_empty_lines(text):
    return ("\n" + text.replace("\n", "\n\n  \n")).encode()


def quoted(text):
    if text.startswith("{"):
        return text.encode()
    lines = [
        ",".join(f'"{cell}"' for cell in line.split(",")) for line in text.split("\n")
    ]
    return "\n".join(line for line in lines if line != '""').encode()


def by_pandas(text):
    """Whole numbers as floats, and a column without a name before the others."""
    if text.startswith("{"):
        return text.encode()
    head, *lines = text.strip().split("\n")
    cells = [line.split(",") for line in lines]
    floats = [[f"{c}.0" if c.isdigit() else c for c in line] for line in cells]
    numbered = [",".join([str(i), *line]) for i, line in enumerate(floats)]
    return "\n".join([f",{head}", *numbered]).encode()


def reordered(text):
    if text.startswith("{"):
        rows = [json.loads(line) for line in text.splitlines()]
        return json.dumps([dict(reversed(row.items())) for row in rows]).encode()
    return "\n".join(
        ",".join(reversed(line.split(","))) for line in text.split("\n")
    ).encode()


@pytest.mark.parametrize(
    "change",
    [
        as_is,
        gzipped,
        with_crlf_and_bom,
        with_empty_lines,
        quoted,
        by_pandas,
        reordered,
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_every_format_in_every_dress(tmp_path, name, change):
    trace = load(tmp_path, change(FILES[name]))
    assert trace.rows == [pytest.approx(row, abs=1e-9) for row in ROWS]
    assert trace.format == name.split(",")[0]
    assert f": {trace.format} format, 3 rows, times in {trace.unit}" in str(trace)
    assert trace.facts["rows"] == 3


@pytest.mark.parametrize("per_s", [1, 10**3, 10**6, 10**9])
@pytest.mark.parametrize("name", ["azure", "burstgpt", "vidur", "mooncake", "bailian"])
def test_epoch_times_show_their_unit(tmp_path, name, per_s):
    column = {"azure": "TIMESTAMP", "burstgpt": "Timestamp", "vidur": "arrived_at"}
    others = {
        "azure": ("ContextTokens", "GeneratedTokens"),
        "burstgpt": ("Request tokens", "Response tokens"),
        "vidur": ("num_prefill_tokens", "num_decode_tokens"),
    }
    prompt, output = others.get(name, ("input_length", "output_length"))
    rows = [
        {
            column.get(name, "timestamp"): (17 * 10**9 + int(10 * row[0])) * per_s / 10,
            prompt: row.prompt_tokens,
            output: row.output_tokens,
            {"mooncake": "hash_ids", "bailian": "chat_id"}.get(name, "more"): [],
        }
        for row in ROWS
    ]
    trace = load(tmp_path, json_lines(*rows))
    assert trace.rows == [pytest.approx(row, abs=1e-6) for row in ROWS]
    unit = {1: "s", 10**3: "ms", 10**6: "us", 10**9: "ns"}[per_s]
    assert trace.unit == f"{unit} since 1970"


# ---- units ---------------------------------------------------------------------------

UNKNOWN = [
    '{"timestamp": 0, "input_length": 6, "output_length": 1}\n',
    "timestamp,prompt_tokens,output_tokens\n0,6,1\n",
    "TIMESTAMP,ContextTokens,GeneratedTokens\n0,6,1\n",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_a_unit_that_no_format_says_is_asked_for(tmp_path, text):
    with pytest.raises(ValueError, match="expected the unit of '.*workload.trace_unit"):
        load(tmp_path, text)
    assert load(tmp_path, text, unit="us").rows == [TraceRow(0.0, 6, 1)]


def test_a_unit_that_is_given_counts(tmp_path):
    text = FILES["mooncake"]
    assert load(tmp_path, text, unit="s").rows[1].arrival_s == 2000
    assert load(tmp_path, text, unit="s").unit == "s"
    with pytest.raises(
        ValueError, match=r"line 2: expected no unit \(s\) beside dates"
    ):
        load(tmp_path, FILES["azure"], unit="s")


@pytest.mark.parametrize("rows", [40, 4000])
def test_seconds_taken_for_milliseconds_are_an_error(tmp_path, rows):
    """Also where ties have to be spread before there are gaps to look at."""
    lines = [
        {"timestamp": 3 * (i // 10), "input_length": 5, "output_length": 1}
        for i in range(rows)
    ]
    text = json_lines({**lines[0], "hash_ids": []}, *lines[1:])
    with pytest.raises(ValueError, match="median gap of 1 ms .* in ms. Name the unit"):
        load(tmp_path, text)
    assert load(tmp_path, text, unit="s").clock.tick_s == 3
    assert load(tmp_path, text, unit="ms").clock.tick_s == 0.003  # confirmed


def test_a_gap_of_a_millisecond_is_no_error(tmp_path):
    """Seen as 0.0009999... s where it is divided; and dates have no other unit."""
    times = [1000 + i for i in range(40)]
    lines = [{"timestamp": t, "input_length": 5, "output_length": 1} for t in times]
    rows = load(tmp_path, json_lines({**lines[0], "hash_ids": []}, *lines[1:])).rows
    assert len(rows) == 40
    dates = (f"{DAY} 01:00:00.{i:06},5,1" for i in range(40))  # a us apart
    rows = load(tmp_path, csv_text(HEADER.strip(), *dates)).rows
    assert rows[-1].arrival_s == pytest.approx(39e-6)


@pytest.mark.parametrize("time", [2 * 10**11, 5 * 10**9, -(17 * 10**9)])
def test_a_time_so_large_that_is_of_no_year_is_no_time_since_1970(tmp_path, time):
    """2e11 ms are of 1976, and 5e9 s of 2128: no trace is."""
    row = {"timestamp": time, "input_length": 6, "output_length": 1, "hash_ids": []}
    with pytest.raises(ValueError, match="unit of a time so large to be known"):
        load(tmp_path, json_lines(row))
    assert load(tmp_path, json_lines(row), unit="ms").rows == [TraceRow(0.0, 6, 1)]


def test_dates_without_a_zone_are_utc_wherever_they_are_read(tmp_path, monkeypatch):
    text = f"{HEADER}2023-11-16 18:00:00,1,2\n2023-11-16 18:00:01+00:00,3,4\n"
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "XXX+5")
        time.tzset()
        rows = load(tmp_path, text).rows
    time.tzset()
    assert rows == [TraceRow(0.0, 1, 2), TraceRow(1.0, 3, 4)]


def test_a_plain_column_names_its_unit(tmp_path):
    text = (
        "arrival_s,prompt_tokens,output_tokens\n1700000000000,1,1\n1700000002000,1,1\n"
    )
    with pytest.raises(
        ValueError, match="line 2: expected a time in s before the year"
    ):
        load(tmp_path, text)


# ---- ties ----------------------------------------------------------------------------


def ticking(rows=12, a_tick=4, tick_ms=3000):
    lines = [
        {
            "timestamp": tick_ms * (i // a_tick),
            "input_length": 5 + i,
            "output_length": 1,
        }
        for i in range(rows)
    ]
    return json_lines({**lines[0], "hash_ids": [1]}, *lines[1:])


def test_ties_of_a_coarse_clock_are_spread_and_said(tmp_path):
    trace = load(tmp_path, ticking())
    assert [row.arrival_s for row in trace.rows] == [0.75 * i for i in range(12)]
    assert (trace.clock.tick_s, trace.clock.tied_rows) == (3.0, 9)
    assert (
        "its clock ticks every 3 s: 9 rows in the tick of the row above are spread "
        "evenly over it (ties=spread); hash_ids are not used" in str(trace)
    )
    assert trace.facts["tick_s"] == 3.0 and trace.facts["ties"] == "spread"


def test_ties_are_kept_where_asked(tmp_path):
    trace = load(tmp_path, ticking(), ties="keep")
    assert [row.arrival_s for row in trace.rows] == [3.0 * (i // 4) for i in range(12)]
    assert "9 rows in the tick of the row above stay there (ties=keep)" in str(trace)


def test_rows_all_at_one_time_must_be_meant(tmp_path):
    with pytest.raises(ValueError, match="got 0 s and inf/s .* --ties=keep"):
        load(tmp_path, ticking(a_tick=12))
    kept = load(tmp_path, ticking(a_tick=12), ties="keep")
    assert {row.arrival_s for row in kept.rows} == {0.0}


def test_dates_at_one_time_must_be_meant_too(tmp_path):
    text = csv_text(HEADER.strip(), *[f"{DAY} 01:00:00,5,1"] * 9)
    with pytest.raises(ValueError, match="taken to be in dates. If so many") as error:
        load(tmp_path, text)
    assert "Name the unit" not in str(error.value)
    assert len(load(tmp_path, text, ties="keep").rows) == 9


def test_most_rows_in_bursts_that_no_tick_explains_must_be_meant(tmp_path):
    text = csv_text(
        "arrival_s,prompt_tokens,output_tokens",
        *(f"{at},5,1" for at in (0.123457, 2.71828, 99.000001) for _ in range(9)),
    )
    with pytest.raises(ValueError, match="really come at one time: --ties=keep"):
        load(tmp_path, text)
    assert load(tmp_path, text, ties="keep").clock.tick_s is None


# ---- lengths only --------------------------------------------------------------------


def test_a_file_with_lengths_only(tmp_path):
    text = "num_decode_tokens,num_prefill_tokens,pd_ratio\n132,521,1\n80.0,676,2\n"
    trace = load(tmp_path, text)
    assert not trace.timed and trace.format == "vidur, lengths only"
    assert [row[1:] for row in trace.rows] == [(521, 132), (676, 80)]
    assert all(math.isnan(row.arrival_s) for row in trace.rows)
    with pytest.raises(ValueError, match="unit: expected none, as the trace has no t"):
        load(tmp_path, text, unit="s")
    with pytest.raises(ValueError, match="ties: expected none, as the trace has no t"):
        load(tmp_path, text, ties="keep")
    with pytest.raises(ValueError, match="ties: expected none, as the trace has no t"):
        load(tmp_path, json.dumps(SHAREGPT), tokens_of=words, ties="keep")


def turn(speaker, words):
    return {"from": speaker, "value": "w " * words}


SHAREGPT = [
    {"id": "a", "conversations": [turn("human", 10), turn("gpt", 20), turn("gpt", 5)]},
    {"id": "b", "conversations": [turn("gpt", 9), turn("human", 7), turn("gpt", 8)]},
    {"id": "c", "conversations": [turn("human", 3), turn("gpt", 20)]},  # short
    {"id": "d", "conversations": [turn("human", 1025), turn("gpt", 20)]},  # long
    {"id": "e", "conversations": [turn("human", 1024), turn("gpt", 1024)]},
    {"id": "f", "conversations": [turn("human", 10), turn("human", 10)]},
    {"id": "g", "conversations": [turn("human", 10)]},
    {"id": "h", "conversations": []},
]


def words(text):
    return len(text.split())


@pytest.mark.parametrize("indent", [None, 2])
def test_sharegpt(tmp_path, indent):
    trace = load(tmp_path, json.dumps(SHAREGPT, indent=indent), tokens_of=words)
    assert [row[1:] for row in trace.rows] == [(10, 20), (7, 8), (1024, 1024)]
    assert "5 of 8 conversations are left out" in str(trace) and not trace.timed


@pytest.mark.parametrize(
    ("conversation", "lengths"),
    [
        # 4 to 1024 tokens each, and together at most 2048.
        ([turn("human", 4), turn("gpt", 4)], (4, 4)),
        ([turn("human", 3), turn("gpt", 4)], None),
        ([turn("human", 4), turn("gpt", 3)], None),
        ([turn("human", 1024), turn("gpt", 1024)], (1024, 1024)),
        ([turn("human", 4), turn("gpt", 1025)], None),
        # Only the first question counts, whatever comes later.
        ([turn("human", 3), turn("gpt", 9), turn("human", 9), turn("gpt", 9)], None),
        ([turn("human", 9), turn("human", 8), turn("gpt", 7)], None),
        ([turn("system", 9), turn("human", 8), turn("gpt", 7)], (8, 7)),
    ],
)
def test_which_conversations_have_lengths(tmp_path, conversation, lengths):
    kept = {"conversations": [turn("human", 5), turn("gpt", 6)]}
    text = json.dumps([kept, {"conversations": conversation}])
    found = [row[1:] for row in load(tmp_path, text, tokens_of=words).rows]
    assert found == [(5, 6)] + ([lengths] if lengths else [])


def test_sharegpt_errors(tmp_path):
    text = json.dumps(SHAREGPT)
    with pytest.raises(ValueError, match="expected a tokenizer for ShareGPT's texts"):
        load(tmp_path, text)
    with pytest.raises(ValueError, match="entry 2: expected a list 'conversations'"):
        load(tmp_path, json.dumps([SHAREGPT[0], {"id": 1}]), tokens_of=words)
    with pytest.raises(ValueError, match="entry 8: expected a JSON object"):
        load(tmp_path, text[:-30], tokens_of=words)


# ---- errors --------------------------------------------------------------------------

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = '{"timestamp": 1, "input_length": 6, "output_length": 5, "hash_ids": []}\n'


def json_error(time="2", prompt="6", output="1"):
    record = f'"timestamp": {time}, "input_length": {prompt}, "output_length": {output}'
    return f"{GOOD}\n{{{record}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,Tokens\n", "line 1: expected a header .*azure.*got TIMESTAMP, Tok"),
        ("arrival_s,prompt_tokens\n1,2\n", "line 1: expected a header with one of arr"),
        (f"{HEADER}{DAY} 1:2:3,1,2\n", "line 2: expected a finite time, or a date"),
        (f"{HEADER}{DAY},1,2\n\n{DAY},x,2\n", "line 4: expected token counts >= 0"),
        (f"{HEADER}{DAY},1,2\n5,1,2\n", "line 3: expected a finite time in .*dates"),
        (f"{HEADER}{DAY},1,-2\n", "line 2: expected token counts >= 0 .*'-2'"),
        (f"{HEADER}{DAY},1\n", "line 2: expected 3 cells, as in the header"),
        (f"{HEADER}{DAY},1,2,3\n", "line 2: expected 3 cells"),
        (f"{HEADER}{DAY},1,\n", "line 2: expected token counts"),
        (f"{HEADER}{DAY},1,2\n2023-11-15,1,2\n", "line 3: .*not before the row above"),
        (HEADER, "expected at least one row, got none"),
        ("", "expected at least one row, got none"),
        (f"{GOOD}{{oops", "line 2: expected a JSON object, got {oops"),
        (f"{GOOD}[1, 2]", "line 2: expected a JSON object"),
        ('{"a": 1}', "line 1: expected a header .*mooncake"),
        (json_error(output='"x"'), "line 3: expected token counts"),
        (json_error(time="null"), "line 3: expected a finite time"),
        (json_error(time="NaN"), "line 3: expected a finite time"),
        (json_error(time="true"), "line 3: expected a finite time"),
        (json_error(prompt="6.5"), "line 3: expected token counts"),
        (json_error(time="9" * 400), "line 3: expected a finite time"),
        (json_error(prompt="1e999"), "line 3: expected token counts"),
        (json_error(prompt="-6"), "line 3: expected token counts"),
        (json_error(time="0"), "line 3: expected a time not before the row above"),
        (b"PAR1\xff\xfe\x00", "expected a whole CSV, JSON lines or JSON file"),
        (gzip.compress(GOOD.encode() * 99)[:-20], "expected a whole CSV, JSON lines"),
        ("a,b\x00\n", "expected"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, message):
    path = write(tmp_path, text, "wrong.csv")
    with pytest.raises(ValueError, match=rf"wrong.csv(, |: ).*{message}|{message}"):
        load_trace(path)


def test_long_lines_are_cut_in_messages(tmp_path):
    path = write(tmp_path, '{"hash_ids": [' + "1, " * 10_000 + "1]")
    with pytest.raises(ValueError, match=r"got .*\.\.\.$") as error:
        load_trace(path)
    assert len(str(error.value)) < 400 + len(str(path))


# ---- large files ---------------------------------------------------------------------


def test_only_the_rows_asked_for_are_read(tmp_path):
    text = FILES["columns"] + "not a row\n"
    assert load(tmp_path, text, max_rows=2).rows == ROWS[:2]
    with pytest.raises(ValueError, match="line 5"):
        load(tmp_path, text)


def test_a_list_longer_than_what_is_read_at_once(tmp_path):
    rows = [
        {"arrival_s": i, "prompt_tokens": i, "output_tokens": 1, "pad": "x" * 999}
        for i in range(3000)
    ]
    assert [row.prompt_tokens for row in load(tmp_path, json.dumps(rows)).rows] == [
        *range(3000)
    ]


# ---- round trips ---------------------------------------------------------------------

TIMES = st.lists(st.integers(0, 10**7), min_size=2, max_size=30, unique=True)


@given(TIMES, st.data())
def test_what_is_written_is_read(tmp_path_factory, times_ms, data):
    """Through each format's own columns, time unit and spelling of numbers."""
    name = data.draw(st.sampled_from(["mooncake", "bailian", "vidur", "splitwise-sim"]))
    columns = {
        "mooncake": ("timestamp", "input_length", "output_length", "hash_ids"),
        "bailian": ("timestamp", "input_length", "output_length", "chat_id"),
        "vidur": ("arrived_at", "num_prefill_tokens", "num_decode_tokens", "x"),
        "splitwise-sim": ("arrival_timestamp", "prompt_size", "token_size", "x"),
    }[name]
    per_s = 1000 if name == "mooncake" else 1
    spell = data.draw(st.sampled_from([str, float, lambda value: value]))
    counts = st.integers(0, 10**6)
    rows = [
        (ms / 1000, data.draw(counts), data.draw(counts)) for ms in sorted(times_ms)
    ]
    records = [
        dict(zip(columns, (t * per_s, spell(p), spell(o), 0), strict=True))
        for t, p, o in rows
    ]
    if data.draw(st.booleans()):
        text = json_lines(*records)
    else:
        lines = (",".join(str(cell) for cell in each.values()) for each in records)
        text = csv_text(",".join(columns), *lines)
    path = write(tmp_path_factory.mktemp("traces"), text)
    trace = load_trace(path, unit="auto" if min_gap_ms(times_ms) > 2 else unit_of(name))
    assert trace.format == name
    first_s = rows[0][0]
    assert trace.rows == [
        (pytest.approx(t - first_s, abs=1e-9), p, o) for t, p, o in rows
    ]


def min_gap_ms(times_ms):
    ordered = sorted(times_ms)
    return min(b - a for a, b in zip(ordered, ordered[1:], strict=False))


def unit_of(name):
    return "ms" if name == "mooncake" else "s"


# ---- real files ----------------------------------------------------------------------


def real_trace(shared_dir: Path, name: str) -> Trace:
    path = shared_dir / "traces" / name
    if not path.is_file():
        pytest.skip(f"no reference data: {path} is missing")
    return load_trace(path)


class TestRealTraces:
    """First rows as they stand in the files; counts, spans found with other tools."""

    def test_azure_2023(self, shared_dir):
        trace = real_trace(shared_dir, "azure2023/AzureLLMInferenceTrace_conv.csv")
        rows = trace.rows
        assert len(rows) == 19366
        assert rows[:2] == [
            TraceRow(0.0, 374, 44),  # 18:15:46.680590
            TraceRow(4.314579, 396, 109),  # 18:15:50.995169
        ]
        assert rows[-1] == TraceRow(3501.721937, 197, 183)
        assert (trace.format, trace.unit, trace.clock.tick_s) == (
            "azure",
            "dates",
            None,
        )

    def test_mooncake(self, shared_dir):
        trace = real_trace(shared_dir, "mooncake/synthetic_trace.jsonl")
        rows = trace.rows
        assert len(rows) == 3993
        assert rows[0] == TraceRow(0.0, 40160, 6)
        assert rows[-1].arrival_s == 1022.025
        assert max(row.prompt_tokens for row in rows) == 191378
        assert min(row.output_tokens for row in rows) == 1
        # Eleven pairs in one ms are no tick.
        assert (trace.unit, trace.clock.tick_s, trace.clock.tied_rows) == (
            "ms",
            None,
            11,
        )
