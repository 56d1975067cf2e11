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


# Steps of 8192 tokens are the default of all three on an H100 or H200.
STARTS: Mapping[str, EngineProfile] = {
    # `EngineArgs.get_batch_defaults` of vLLM's server, from 70 GiB on. An A100 or a
    # smaller device has 2048 tokens and 256 requests. `CacheConfig`:
    # gpu_memory_utilization.
    "vllm": _start("vllm", "vllm_v1", 1024, 0.9),
    # `TorchLlmArgs` of TensorRT-LLM: max_num_tokens, max_batch_size. `KvCacheConfig`:
    # free_gpu_memory_fraction is of what weights leave, so that a little more memory is
    # for KV than here. Chunked context is off by default, and prompts are in whole then
    # (see `scheduling.tensorrt_llm`).
    "trtllm": _start("trtllm", "tensorrt_llm", 2048, 0.9),
    # `ServerArgs` of SGLang 0.5: chunked_prefill_size, from 160 GiB on 16384. Its
    # mem_fraction_static follows from that, tp and the memory: 0.82 to 0.84 on an H100,
    # 0.90 on an H200, 0.85 on a B200; 0.88 where the memory is not known. It computes
    # waiting prompts first, and holds 2048 requests or more.
    "sglang": _start("sglang", "vllm_v0", 2048, 0.88),
}
