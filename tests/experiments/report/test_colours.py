"""Colours of systems: one each, whatever else is in the picture."""

import itertools

from disagg_jax.scheduling import SYSTEMS
from experiments.report.colours import (
    COLOURS,
    NO_SYSTEM,
    system_colour,
    system_colours,
)

NAMES = [f"my_module:{i}" for i in range(40)]


def test_every_system_has_a_colour_of_its_own():
    colours = system_colours(SYSTEMS)
    assert list(colours) == list(SYSTEMS)
    assert len({*colours.values()}) == len(SYSTEMS)
    assert NO_SYSTEM not in colours.values()
    assert len(set(COLOURS)) == len(COLOURS) > max(colours.values())


def test_a_colour_does_not_depend_on_the_other_systems():
    for names in itertools.combinations([*SYSTEMS, NAMES[0]], 2):
        assert system_colours(names) == {name: system_colour(name) for name in names}


def test_names_of_papers_and_of_before_have_the_colour_of_their_system():
    for name, system in (
        ("vLLM", "vllm_v0"),
        ("vllm", "vllm_v0"),
        ("DistServe", "disaggregated"),
        ("Sarathi-Serve", "sarathi_serve"),
    ):
        assert system_colour(name) == system_colour(system)


def test_own_systems_have_colours_that_no_listed_one_has():
    listed = {*system_colours(SYSTEMS).values(), NO_SYSTEM}
    assert not listed & {system_colour(name) for name in NAMES}


def test_two_own_systems_of_a_picture_never_share_a_colour_while_there_are_others():
    room = len(COLOURS) - 1  # all but that of no system
    colours = system_colours(NAMES[:room])
    assert len({*colours.values()}) == room and NO_SYSTEM not in colours.values()
    assert system_colours(reversed(NAMES[:room])) == colours  # in whatever order
    assert len(system_colours([*SYSTEMS, *NAMES])) == len(SYSTEMS) + len(NAMES)
