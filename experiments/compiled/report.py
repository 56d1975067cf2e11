"""Records of compiled programs as a table."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.compiled.records import ProgramRecord

HEAD = (
    *("target", "instance", "program", "layers", "s", "args GiB", "temp MiB", "fits"),
    *("pool copies", "GB", "GB/bound", "GFLOP", "GFLOP/bound"),
    *("roofline ms", "estimate ms"),
)
LABELS = 3  # leading columns that are names


def row(record: ProgramRecord) -> tuple[str, ...]:
    """Return the cells of a record, in the order of `HEAD`."""

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    return (
        record.target,
        record.instance,
        record.program,
        f"{record.layers}/{record.model_layers}",
        f"{record.compile_s:.1f}",
        cell(record.argument_bytes, ".2f", 2**-30),
        cell(record.temp_bytes, ".1f", 2**-20),
        "yes" if record.fits else "NO",
        cell(record.pool_copies, ".0f"),
        cell(record.hbm_bytes, ".4g", 1e-9),
        cell(record.bytes_over_bound, ".2f"),
        cell(record.flops, ".4g", 1e-9),
        cell(record.flops_over_bound, ".2f"),
        f"{record.roofline_s * 1e3:.3g}",
        cell(record.estimate_s, ".3g", 1e3),
    )


def notes(records: Sequence[ProgramRecord]) -> list[str]:
    """Return what the table cannot say: errors, and what was counted with a guess."""
    lines: list[str] = []
    for record in records:
        where = f"{record.target} {record.instance} {record.program}"
        if record.error:
            lines.append(f"{where}: {record.error}")
        if record.unknown_loops:
            loops = ", ".join(record.unknown_loops)
            lines.append(f"{where}: loops of unknown length, counted once: {loops}")
        if record.unstated_kernels:
            kernels = ", ".join(record.unstated_kernels)
            lines.append(f"{where}: kernels counted by their arrays alone: {kernels}")
    if any(record.layers < record.model_layers for record in records):
        lines.append(
            "By repetition: seconds, temp and pool copies are of the layers that were "
            "compiled; all else is of the model, whose other layers are taken to be as "
            "these. XLA may place arrays of a larger program elsewhere: 4 of 32 layers "
            "of llama-3-8b gave a decode 14 % fewer bytes than all of them."
        )
    return lines
