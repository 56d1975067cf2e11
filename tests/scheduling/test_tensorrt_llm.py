"""TensorRT-LLM's policy: who is admitted, and that nobody is evicted."""

from disagg_jax.deployment import Role
from tests.sim.linear_runs import linear_deployment


def serve(policy, requests, blocks):
    deployment = linear_deployment(
        "colocated:tp1", {Role.COLOCATED: policy}, num_blocks=blocks
    )
    return deployment.run(requests).timelines
