"""Step times: medians of rounds, their halves, and when there are enough rounds."""

import pytest

from disagg_jax.calibration import step_times
from disagg_jax.calibration.step_times import StepTimes, measure_step_times
from disagg_jax.calibration.works import every_work


def test_the_seconds_of_a_program_are_the_median_of_its_rounds():
    times = StepTimes(rounds={"a": [3.0, 1.0, 2.0], "b": [5.0]})
    assert times.seconds == {"a": 2.0, "b": 5.0}
    with pytest.raises(ValueError, match=r"a: expected a time, got \[\]"):
        StepTimes(rounds={"a": []})


def test_halves_are_halves_in_time_and_of_a_single_round_there_are_none():
    first, second = StepTimes(rounds={"a": [1.0, 2.0, 9.0, 3.0, 4.0]}).halves
    assert first.rounds == {"a": [1.0, 2.0]} and second.rounds == {"a": [3.0, 4.0]}
    alone = StepTimes(rounds={"a": [1.0]})
    assert (alone.halves, alone.unsteady, alone.is_steady) == (None, None, False)
    assert StepTimes(rounds={}).halves is None  # modelled: nothing was timed


@pytest.mark.parametrize(
    ("late", "unsteady"), [(1.04, 0.0), (1.06, 1.0), (0.96, 0.0), (0.94, 1.0)]
)
def test_a_program_is_unsteady_beyond_5_percent_either_way(late, unsteady):
    times = StepTimes(rounds={"a": [1.0, 1.0, late, late]})
    assert times.unsteady == unsteady
    assert times.is_steady == (unsteady == 0)


def test_one_of_ten_programs_may_be_unsteady():
    rounds = {str(i): [1.0, 1.0] for i in range(9)}
    assert StepTimes(rounds={**rounds, "last": [1.0, 2.0]}).is_steady
    assert not StepTimes(rounds={**rounds, "x": [1.0, 2.0], "y": [1.0, 2.0]}).is_steady


@pytest.mark.parametrize(("settles_at", "rounds"), [(0, 6), (3, 10), (99, 12)])
def test_rounds_end_when_medians_are_steady(known, monkeypatch, settles_at, rounds):
    """The machine becomes slower until a round, and then keeps its speed."""
    engine, said = known["vllm_v0"], []

    def time_alone(engine, work):
        parts = len(engine.part_keys(work))
        return [float(2 ** min(len(said), settles_at + 1))] * parts

    monkeypatch.setattr(step_times, "time_alone", time_alone)
    times = measure_step_times([engine], 12, lambda *step: said.append(step))
    timed = {key: len(each) for key, each in times.rounds.items()}
    needed = {key for work in every_work(engine) for key in engine.part_keys(work)}
    assert timed == dict.fromkeys(needed, rounds)
    assert len(said) == rounds + 1  # one is the warm-up
