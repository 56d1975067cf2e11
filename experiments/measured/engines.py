"""The limits and policies of serving engines, which a fit takes as given."""

from __future__ import annotations

from collections.abc import Mapping

from disagg_jax.sim.cost.step_terms import EngineFactors
from disagg_jax.sim.engines import EngineProfile


def _start(
    engine: str, system: str, max_seqs: int, memory_utilisation: float
) -> EngineProfile:
    return EngineProfile(
        name=engine,
        engine=engine,
        versions=(),
        is_default=True,
        factors=EngineFactors(),
        system=system,
        token_budget=8192,
        max_seqs=max_seqs,
        memory_utilisation=memory_utilisation,
    )


# Steps of 8192 tokens are the default of all three on devices with 70 GiB and more.
STARTS: Mapping[str, EngineProfile] = {
    # vLLM 0.12, `EngineArgs.get_batch_defaults` and `CacheConfig`.
    "vllm": _start("vllm", "vllm_v1", 1024, 0.9),
    # TensorRT-LLM 1.0, `LlmArgs`: max_batch_size, and free_gpu_memory_fraction of what
    # weights leave.
    "trtllm": _start("trtllm", "tensorrt_llm", 2048, 0.9),
    # SGLang 0.5, `ServerArgs`: chunked_prefill_size, and mem_fraction_static of a
    # device with 80 GB and more. It computes waiting prompts first.
    "sglang": _start("sglang", "vllm_v0", 2048, 0.88),
}
