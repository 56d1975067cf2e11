"""Profiles of engines: their files, whose they are, and what they say of themselves."""

import dataclasses
import json

import pytest

from disagg_jax.deployment import InstanceSpec, Role
from disagg_jax.formats import ENGINE_PROFILE
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.tensorrt_llm import NoEvict
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.sim import Simulation
from disagg_jax.sim.cost.step_terms import EngineFactors
from disagg_jax.sim.device_cost import roofline
from disagg_jax.sim.engines import (
    EngineProfile,
    FitError,
    engine_names,
    engine_of,
    get_engine,
)
from disagg_jax.sim.engines.profile import from_json, to_json
from disagg_jax.sim.hardware import get_hardware
from disagg_jax.work import StepLoad
from models.lookup import find_model


def fit_error(model="", hardware="", precision="", rows=9, tpot=0.125):
    return FitError(
        model=model,
        hardware=hardware,
        precision=precision,
        rows=rows,
        tpot=tpot,
        ttft=0.3,
        latency=0.1,
    )


MINE = EngineProfile(
    name="mine-2",
    engine="mine",
    versions=("2.", "3"),
    is_default=False,
    factors=EngineFactors(linear=0.9, step_s=1e-3),
    system="vllm_v1",
    token_budget=512,
    max_seqs=64,
    memory_utilisation=0.8,
    first_token_steps=2.5,
    errors=(fit_error(), fit_error("llama-3-8b", "h100", "bf16", 4, 0.05)),
    provenance={"rows": 9},
)

# -- files ----------------------------------------------------------------------------


def test_a_profile_reads_back_as_it_was_written(tmp_path):
    path = tmp_path / "mine-2.json"
    path.write_text(json.dumps(to_json(MINE)))
    assert get_engine(str(path)) == MINE == from_json(to_json(MINE))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": 99}, "engine profile: expected format 0 to 1.*fit_engine, got 99"),
        ({"max_seqs": None}, "engine profile: expected .*'max_seqs'.*, got "),
        ({"colour": 3}, "engine profile: expected .* got .*'colour'"),
        ({"token_budget": 0}, "mine-2: token_budget: expected >= 1, got 0"),
        ({"token_budget": "8k"}, "profile.token_budget: expected a number, got '8k'"),
        ({"max_seqs": 0}, "mine-2: max_seqs: expected >= 1, got 0"),
        ({"memory_utilisation": 1.5}, r"mine-2: memory_utilisation: .*1\], got 1.5"),
        ({"memory_utilisation": 0}, "mine-2: memory_utilisation: expected .* got 0"),
        ({"versions": "0.12"}, "engine profile.versions: expected a list, got '0.12'"),
        ({"factors": [1.0]}, "engine profile.factors: expected an object"),
        ({"factors": {"linear": 1.0}}, r"factors: expected .*, got \['linear'\]"),
        ({"errors": [{"rows": 3}]}, r"errors: expected .*, got \['rows'\]"),
        ({"errors": {}}, "engine profile.errors: expected a list"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, said):
    record = {**to_json(MINE), **change}
    kept = {key: value for key, value in record.items() if value is not None}
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=said):
        get_engine(str(path))


@pytest.mark.parametrize(
    "value, said",
    [
        (-1.0, "linear: expected >= 0, got -1.0"),
        (None, "engine profile.factors.linear: expected a number, got None"),
    ],
)
def test_a_factor_is_a_number_and_not_negative(value, said):
    record = to_json(MINE)
    record["factors"]["linear"] = value
    with pytest.raises(ValueError, match=said):
        from_json(record)


def test_a_file_that_is_not_there_or_no_json(tmp_path):
    with pytest.raises(FileNotFoundError):
        get_engine(str(tmp_path / "none.json"))
    path = tmp_path / "text.json"
    path.write_text("linear: 1")
    with pytest.raises(ValueError, match=r"text\.json"):
        get_engine(str(path))


# -- presets --------------------------------------------------------------------------


def test_presets():
    assert {"ideal", "vllm-0.12", "trtllm-1.0", "sglang-0.5"} <= {*engine_names()}
    for name in engine_names():
        profile = get_engine(name)
        assert profile.name == name
        assert ENGINE_PROFILE.read(to_json(profile))
        assert set(profile.policies) == set(Role)  # with limits that these take
    expected = r"engine: expected one of \['ideal', .*\] or a .json file, got 'vllm-9'"
    with pytest.raises(ValueError, match=expected):
        get_engine("vllm-9")


def test_every_engine_has_one_default():
    profiles = [get_engine(name) for name in engine_names()]
    engines = {profile.engine for profile in profiles}
    assert engines == {"vllm", "trtllm", "sglang", "ideal"}
    for engine in engines:
        assert [p.is_default for p in profiles if p.engine == engine].count(True) == 1
    named = [v for p in profiles for v in p.versions]
    assert len(named) == len(set(named))


def test_the_ideal_engine_adds_nothing_to_a_devices_kernels():
    ideal = get_engine("ideal")
    assert ideal.factors == EngineFactors()
    assert (ideal.first_token_steps, ideal.errors) == (0.0, ())


@pytest.mark.parametrize(
    "engine, version, name",
    [
        ("vllm", "0.12", "vllm-0.12"),
        ("vllm", "0.12.1rc0", "vllm-0.12"),
        ("vllm", "0.11.2", "vllm"),
        ("vllm", "", "vllm"),
        ("trtllm", "1.0.0", "trtllm-1.0"),
        ("trtllm", "1.1.0rc2", "trtllm"),
        ("sglang", "0.4", "sglang-0.5"),  # the one of its engine
        ("ideal", "7", "ideal"),
    ],
)
def test_a_version_has_its_profile_or_else_the_default(engine, version, name):
    assert engine_of(engine, version).name == name


def test_an_engine_without_a_profile_is_refused():
    engines = r"\['ideal', 'sglang', 'trtllm', 'vllm'\]"
    with pytest.raises(ValueError, match=f"engine: expected one of {engines}, got 'x'"):
        engine_of("x", "1")


# -- who runs next --------------------------------------------------------------------


@pytest.mark.parametrize(
    "system, policy",
    [("vllm_v0", PrefillFirst), ("vllm_v1", RunningFirst), ("tensorrt_llm", NoEvict)],
)
def test_policies_have_the_limits_of_the_engine(system, policy):
    profile = dataclasses.replace(MINE, system=system)
    assert profile.policies == {
        Role.COLOCATED: policy(max_batched_tokens=512, max_seqs=64),
        Role.PREFILL: PrefillOnly(token_budget=512, max_seqs=64),
        Role.DECODE: DecodeOnly(max_seqs=64),
    }


def test_decodes_do_not_exceed_a_step():
    # Policies that mix refuse more requests than a step has tokens.
    profile = dataclasses.replace(MINE, token_budget=32)
    assert profile.policies[Role.COLOCATED].max_seqs == 32
    assert profile.policies[Role.DECODE].max_seqs == 64


def test_a_simulation_has_the_engines_policy_memory_and_overheads(tmp_path):
    path = tmp_path / "mine-2.json"
    path.write_text(json.dumps(to_json(MINE)))
    ours = Simulation.of("llama-3-8b", "h100", engine=str(path))
    plain = Simulation.of("llama-3-8b", "h100")
    assert ours.cost.name == "roofline/h100/mine-2"
    assert ours.cost.checked == MINE.checked("llama-3-8b", "h100", "bf16")
    policy = ours.policies[Role.COLOCATED]
    assert policy == RunningFirst(max_batched_tokens=512, max_seqs=64)
    spec = InstanceSpec(role=Role.COLOCATED)
    # A tenth of 80 GiB, at 128 KiB a token.
    assert plain.kv_tokens(spec) - ours.kv_tokens(spec) == 2**16
    # Their steps differ by what the factors say of their terms, which are the same.
    one, other = (s.cost.instance(spec.parallelism) for s in (ours, plain))
    load = StepLoad(((0, 100),), 3, 900)
    assert one.terms(load) == other.terms(load)
    (terms,) = one.terms(load)
    assert one.stages_s(load)[0] == pytest.approx(MINE.factors.time_s(terms))


# -- how far it was from measurements -------------------------------------------------


@pytest.mark.parametrize(
    "case, text",
    [
        (
            ("llama-3-8b", "h100", "bf16"),
            "engine mine-2: TPOT within 5.0% on average of 4 measured rows of "
            "llama-3-8b on h100 (cross-validated)",
        ),
        (
            ("llama-3-8b", "h200", "bf16"),
            "engine mine-2: not checked for llama-3-8b on h200, bf16; TPOT within "
            "12.5% on average of 9 other rows",
        ),
        (
            ("llama-3-8b", "h100", "fp8"),
            "engine mine-2: not checked for llama-3-8b on h100, fp8; TPOT within 12.5% "
            "on average of 9 other rows",
        ),
    ],
)
def test_what_was_checked_is_said(case, text):
    assert MINE.checked(*case) == text


def test_a_profile_without_measurements_says_so():
    unchecked = "engine ideal: not checked against any measurement"
    assert get_engine("ideal").checked("llama-3-8b", "h100", "bf16") == unchecked


def test_costs_say_what_was_checked():
    model, hardware = find_model("llama-3-8b"), get_hardware("h100")
    assert roofline(model, hardware).checked == "engine none: not checked"
    assert roofline(model, hardware, MINE).checked == MINE.checked(
        model.name, hardware.name, "bf16"
    )
