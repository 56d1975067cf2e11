"""Measured rows: what was served, where, how, and the latencies that came out.

The columns are those of the AIConfigurator project's `silicon_sample.csv`. A row is a
closed loop of clients on one engine: colocated (`agg`), or on prefill and decode
workers (`disagg`). Three of its columns do not say what their names do:

Devices. Where InferenceX states tp = t and ep = t over the same t devices, the
collection multiplied the two. A row with moe_tp_size = moe_ep_size = t has t * t as its
attention size, though its id says `tp4_ep4` and its machine has 8 devices. So a
colocated row whose experts seem to lie on t * t devices has t, all of them hold
experts, and attention is split by t, or has t replicas where attention_dp_size > 1.
The same goes for attention_dp_size = tp_size = t with moe_ep_size = t * t. In rows of
other sources attention_dp_size is empty, and their experts count where they multiply to
tp_size: others state tp_size = 1 with moe_tp_size = 4.

Concurrency. It is `silicon_concurrency` in the source's text, or else the batch size.
batch_size is that of a replica where attention has several, and in a few rows that of
one of several whole replicas: 384 clients at a batch of 96 without attention_dp_size
are four servers of 96 clients each, of which one is simulated.

Lengths. `isl` and `osl` are the longest of InferenceX's requests, and all of others'
have them: see `served.Client`.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

from disagg_jax.errors import require

_SIZES = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
_WORKERS = ("batch_size", "num_workers", *_SIZES)
COLUMNS = (
    *("id", "silicon_data_source", "backend", "backend_version", "model_path"),
    *("system", "precision", "mode", "isl", "osl", "gemm_quant_mode"),
    *("moe_quant_mode", "batch_size", *_SIZES),
    *(f"{side}_{name}" for side in ("prefill", "decode") for name in _WORKERS),
    *("silicon_ttft_ms", "silicon_tpot_ms"),
)
_MODES = ("agg", "disagg")
_CONCURRENCY = re.compile(r"silicon_concurrency=(\d+)")
# Checkpoints of one architecture: what was done to the weights is no part of its name.
_CHECKPOINT = re.compile(
    r"(-(instruct|base|chat|it|hf|bf16|fp8|fp4|nvfp4|mxfp4|int4|awq|gptq|v2|\d{4}))+$"
)

Fields = Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A closed loop on a deployment."""

    deployment: str  # as `Deployment.parse` reads it
    parallelism: str  # of the instances that decode
    devices: int
    clients: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One measurement."""

    id: str
    engine: str  # vllm, trtllm or sglang
    version: str  # of the engine; "" where none is recorded
    model: str  # architecture, such as llama-3.1-8b
    hardware: str  # h100_sxm
    precision: str  # bf16, fp8, fp4 or int4
    gemm: str  # precision of the matmuls: bf16, fp8, fp8_block, nvfp4, int4_wo
    experts: str  # the same of the experts
    mode: str  # agg or disagg
    prompt_tokens: int
    output_tokens: int  # the longest output
    ttft_s: float  # mean
    tpot_s: float  # mean
    is_public: bool  # measured by InferenceX
    may_speculate: (
        bool  # whether a step may have made several tokens; see `_speculates`
    )
    loop: Loop | None  # None where the row does not say what was served on
    skipped: str = ""  # the reason, where there is no loop


def read_rows(path: pathlib.Path) -> list[MeasuredRow]:
    """Read a CSV file of measurements, in its order.

    Raises:
      ValueError: naming the columns that are missing, or the row and column that are
        not what was expected.
      OSError: if the file cannot be read.
    """
    try:
        with path.open(newline="") as file:
            lines = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
            expected = f"{path}: expected the columns of measured rows, got none of"
            require(not missing, expected, missing)
            rows = [_read(fields, f"{path}:{lines.line_num}") for fields in lines]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a CSV file, got {error}") from error
    require(bool(rows), f"{path}: expected at least one row", "a header alone")
    seen = set[str]()
    for row in rows:
        require(row.id not in seen, f"{path}: expected different ids", row.id)
        seen.add(row.id)
    return rows


def select(rows: list[MeasuredRow], ids: list[str]) -> list[MeasuredRow]:
    """Return the rows of these ids, in their order.

    Raises:
      ValueError: naming the ids that no row has.
    """
    by_id = {row.id: row for row in rows}
    unknown = [id for id in ids if id not in by_id]
    require(not unknown, f"--ids: expected some of the {len(rows)} rows' ids", unknown)
    return [by_id[id] for id in ids]


def _read(fields: Fields, where: str) -> MeasuredRow:
    short = [name for name in COLUMNS if fields[name] is None]
    require(not short, f"{where}: expected a value in each column, got none in", short)
    require(bool(fields["id"]), f"{where}: expected an id", fields["id"])
    try:
        return _row(fields)
    except ValueError as error:
        raise ValueError(f"{where}: row {fields['id']}: {error}") from error


def _row(fields: Fields) -> MeasuredRow:
    mode = fields["mode"]
    require(mode in _MODES, f"mode: expected one of {_MODES}", mode)
    loop = _colocated(fields) if mode == "agg" else _disaggregated(fields)
    return MeasuredRow(
        id=fields["id"],
        engine=fields["backend"],
        version=fields["backend_version"],
        model=architecture(fields["model_path"]),
        hardware=fields["system"],
        precision=fields["precision"] or "bf16",
        gemm=fields["gemm_quant_mode"] or "bf16",
        experts=fields["moe_quant_mode"] or "bf16",
        mode=mode,
        prompt_tokens=_count(fields, "isl"),
        output_tokens=_count(fields, "osl"),
        ttft_s=_milliseconds(fields, "silicon_ttft_ms"),
        tpot_s=_milliseconds(fields, "silicon_tpot_ms"),
        is_public=_is_public(fields),
        may_speculate=_speculates(fields),
        loop=loop if isinstance(loop, Loop) else None,
        skipped=loop if isinstance(loop, str) else "",
    )


def architecture(model_path: str) -> str:
    """Return the name of a checkpoint's architecture: llama-3.1-8b, qwen3-235b-a22b."""
    name = model_path.rpartition("/")[2].lower().removeprefix("meta-")
    return _CHECKPOINT.sub("", name)


# -- colocated -----------------------------------------------------------------------


def _colocated(fields: Fields) -> Loop | str:
    sizes = _read_sizes(fields, "")
    if _is_public(fields):
        sizes = _divided(sizes)
    elif sizes.moe_tp * sizes.moe_ep != sizes.tp * sizes.dp:
        sizes = dataclasses.replace(sizes, moe_ep=1)
    batch = _optional_count(fields, "batch_size")
    clients = _concurrency(fields) or batch
    if clients is None:
        return "no concurrency"
    if batch is not None and sizes.dp == 1 and clients > batch:
        clients = batch
    text = sizes.text
    return Loop(
        deployment=f"colocated:{text}",
        parallelism=text,
        devices=sizes.devices,
        clients=clients,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The parallelism of a row's instance, as its columns have it."""

    tp: int
    pp: int
    dp: int  # attention replicas
    moe_tp: int
    moe_ep: int

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def text(self) -> str:
        """Return it as in a deployment's text; sizes of one are left out but tp."""
        rest = {"pp": self.pp, "dp": self.dp, "ep": self.moe_ep}
        return f"tp{self.tp}" + "".join(f"{n}{k}" for n, k in rest.items() if k > 1)


def _divided(sizes: _Sizes) -> _Sizes:
    """Return the sizes of an InferenceX row whose tp and ep were multiplied."""
    replicas, t = sizes.dp > 1, sizes.moe_ep
    doubled = sizes.moe_tp == t > 1 and sizes.tp * sizes.dp == t * t
    if not doubled and replicas and sizes.dp == sizes.tp:
        t = sizes.tp
        doubled = sizes.moe_ep == t * t
    if not doubled:
        return sizes
    tp, dp = (1, t) if replicas else (t, 1)
    return dataclasses.replace(sizes, tp=tp, dp=dp, moe_tp=1, moe_ep=t)


def _is_public(fields: Fields) -> bool:
    """Return whether a row comes from InferenceX: a dump, or a file of a day."""
    source = fields["silicon_data_source"]
    return bool(re.match(r"db-dump|source_file=\d{4}-\d\d-\d\d\.csv", source))


def _speculates(fields: Fields) -> bool:
    """Return whether a row may be one with speculative decoding, which is not marked.

    InferenceX also measures DeepSeek with multi-token prediction. Its dump of a day
    names the runs without it DeepSeek-V3; the files of a day have both as DeepSeek-R1:
    the same set-up comes twice there, with TPOTs that differ by a factor of 1.3 to 2.
    """
    file = fields["silicon_data_source"].startswith("source_file=")
    r1 = architecture(fields["model_path"]) == "deepseek-r1"
    return file and r1 and _is_public(fields)


def _concurrency(fields: Fields) -> int | None:
    found = _CONCURRENCY.search(fields["silicon_data_source"])
    return int(found[1]) or None if found else None


# -- disaggregated ---------------------------------------------------------------------


def _disaggregated(fields: Fields) -> Loop | str:
    counts = {
        side: _optional_count(fields, f"{side}_num_workers")
        for side in ("prefill", "decode")
    }
    prefills, decodes = counts["prefill"], counts["decode"]
    if prefills is None or decodes is None:
        return "no worker counts"
    prefill, decode = (_read_sizes(fields, f"{side}_") for side in counts)
    clients = _concurrency(fields)
    if clients is None:
        batch = _optional_count(fields, "decode_batch_size")
        if batch is None:
            return "no concurrency"
        clients = batch * decodes * decode.dp
    return Loop(
        deployment=f"{prefills}xprefill:{prefill.text},{decodes}xdecode:{decode.text}",
        parallelism=decode.text,
        devices=prefills * prefill.devices + decodes * decode.devices,
        clients=clients,
    )


# -- columns ---------------------------------------------------------------------------


def _read_sizes(fields: Fields, side: str) -> _Sizes:
    def size(name: str) -> int:
        return _optional_count(fields, f"{side}{name}") or 1

    return _Sizes(
        tp=_count(fields, f"{side}tp_size"),
        pp=size("pp_size"),
        dp=size("attention_dp_size"),
        moe_tp=size("moe_tp_size"),
        moe_ep=size("moe_ep_size"),
    )


def _count(fields: Fields, column: str) -> int:
    found = _optional_count(fields, column)
    if found is None:
        raise ValueError(f"{column}: expected an integer >= 1, got '{fields[column]}'")
    return found


def _optional_count(fields: Fields, column: str) -> int | None:
    """Return an integer; None where the cell is empty or 0, which means not used."""
    text = fields[column].strip()
    if not text:
        return None
    number = _number(text)
    valid = number is not None and number >= 0 and number == int(number)
    require(valid, f"{column}: expected an integer >= 0 or nothing", text)
    return int(number or 0) or None


def _milliseconds(fields: Fields, column: str) -> float:
    text = fields[column].strip()
    number = _number(text)
    require(number is not None and number > 0, f"{column}: expected ms > 0", text)
    return (number or 0.0) / 1e3


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
