"""The index that routers ask for the least loaded instance."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.control.instance_index import InstanceIndex
from tests.instances import make_instance, state


def by_load(instance):
    return (instance.load,)


def by_queue(instance):
    return instance.queued, instance.load


def never(instance):
    raise AssertionError("least() is to read no instance one by one")


@dataclasses.dataclass
class Fleet:
    """Instances whose queues grow and shrink, and which are lost and come back."""

    instances: list
    index: InstanceIndex

    def change(self, id: int, by: int) -> None:
        instance = self.instances[id]
        if by == 0:
            instance.up = not instance.up
            self.index.find_up()
        elif by > 0:
            instance.waiting.extend(state(100 + i, 5) for i in range(by))
        else:
            for _ in range(min(-by, len(instance.waiting))):
                instance.waiting.popleft()
        self.index.touched.add(id)

    def check(self, rank) -> None:
        up = [instance for instance in self.instances if instance.up]
        assert len(self.index) == len(up)
        if up:
            assert self.index.least(rank) is min(up, key=lambda i: (rank(i), i.id))


def make_fleet(size: int, look=never) -> Fleet:
    instances = [make_instance(id=i) for i in range(size)]
    return Fleet(instances, InstanceIndex(instances, look))


CHANGES = st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), max_size=40)


@given(CHANGES, st.sampled_from([by_load, by_queue]), st.integers(1, 4))
def test_the_least_is_what_a_look_at_all_finds(changes, rank, every):
    """Whatever changed, and however many changes lie between two questions."""
    fleet = make_fleet(5)
    for number, change in enumerate(changes):
        fleet.change(*change)
        if number % every == 0:
            fleet.check(rank)
    fleet.check(by_load)
    fleet.check(by_queue)


def test_an_instance_is_brought_up_to_date_before_it_is_read():
    read = []
    fleet = make_fleet(3, look=read.append)
    a, b, c = fleet.instances
    assert list(fleet.index) == [a, b, c] == read
    assert fleet.index[-1] is c
    assert read == [a, b, c, c]
    fleet.change(1, 0)
    assert list(fleet.index) == [a, c]
    assert b not in fleet.index and a in fleet.index
    assert make_instance(id=0) not in fleet.index  # another one, of equal id


def test_a_question_does_not_visit_all_instances():
    """A question after one change ranks a few instances, however many there are."""
    ranked = []

    def rank(instance):
        ranked.append(instance.id)
        return by_load(instance)

    fleet = make_fleet(1000)
    fleet.index.least(rank)  # the first question ranks all
    for _ in range(50):
        del ranked[:]
        fleet.change(fleet.index.least(rank).id, +1)
        fleet.change(999, -1)
        del ranked[:]
        fleet.index.least(rank)
        assert len(ranked) <= 6
