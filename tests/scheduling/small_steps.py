"""Steps of 8 tokens and 4 requests, on blocks of 4 tokens, by hand and drawn."""

from hypothesis import strategies as st

from disagg_jax.deployment import Role
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.work import Arrived
from tests.serving import (
    Run,
    assert_all_free,
    make_controller,
    make_request,
    with_prompt,
)

BUDGET, SEQS = 8, 4  # tokens and requests
SARATHI = {Role.COLOCATED: SarathiServe(token_budget=BUDGET, max_seqs=SEQS)}

# (second of arrival, prompt, output) of each request
LOADS = st.lists(
    st.tuples(st.integers(0, 8), st.integers(1, 20), st.integers(1, 6)),
    min_size=1,
    max_size=8,
)


def run(*lengths, blocks, policies):
    """Serve (prompt, output) of each; return the run, with all memory free again."""
    controller = make_controller(blocks=blocks, policies=policies)
    done = Run(controller)
    done.turn(*(Arrived(with_prompt(i, 0.0, *both)) for i, both in enumerate(lengths)))
    done.finish()
    assert_all_free(controller)
    return done


def schedule(*lengths, blocks, policies):
    """The tokens of each request in each step."""
    steps = run(*lengths, blocks=blocks, policies=policies).steps
    return [{part.request.id: part.count for part in s.slices} for s in steps]


def requests(drawn):
    """Make the requests of a drawn load."""
    return [
        make_request(i, float(at), prompt, out)
        for i, (at, prompt, out) in enumerate(sorted(drawn))
    ]
