"""Hand-made timelines, shared by the tests of metrics and of their summary."""

from disagg_jax.metrics import SLO
from disagg_jax.request import Request, Status, Timeline

SLO_1 = SLO(ttft_s=1.0, tpot_s=0.5)


def served(
    token_s: list[float],
    arrival_s: float = 0.0,
    status: Status = Status.FINISHED,
    **stamps: float | list[float],
) -> Timeline:
    """A request with these token stamps; colocated and never queued unless said."""
    request = Request(
        id=7, arrival_s=arrival_s, prompt_tokens=10, max_tokens=max(1, len(token_s))
    )
    timeline = Timeline(
        request=request, status=status, token_s=token_s, prefill_start_s=arrival_s
    )
    if token_s:
        timeline.decode_start_s = token_s[0]
        timeline.end_s = token_s[-1]
    for name, value in stamps.items():
        setattr(timeline, name, value)
    return timeline


# Arrives at 1, waits 1, prefills 2 (first token at 4), waits 1 for the pull, transfers
# 2, waits 0.5, then four more tokens in 3.5 s. All are exact in binary.
DISAGGREGATED = served(
    [4.0, 8.0, 8.5, 9.0, 11.0],
    arrival_s=1.0,
    prefill_start_s=2.0,
    transfer_start_s=5.0,
    transfer_end_s=7.0,
    decode_start_s=7.5,
)
