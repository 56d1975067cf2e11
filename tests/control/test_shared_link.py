"""A shared link by itself; `test_clock_properties` has whole runs of it."""

from disagg_jax.control.shared_link import SharedLink


def test_no_end_is_before_now():
    # 0.1 + 0.2 is a rounding error more than 0.3, by which more than 0.2 was served.
    link, now_s = SharedLink(), 0.1 + 0.2
    link.add(0.1, 0, 0.2)
    link.add(now_s, 1, 1.0)
    assert link.served_s > 0.2
    assert link.next_end() == (0, now_s)
    assert link.finish(now_s) == (0, 0.1)
    assert link.next_end() == (1, now_s + 1.0)


def test_parts_of_one_transfer_have_one_share():
    link = SharedLink()
    link.add(0.0, 0, 2.0)
    link.add(0.0, 1, 4.0)
    link.add(1.0, 0, 2.0)  # the second part of 0; half a second of each is served
    assert link.next_end() == (0, 4.0)
    assert link.finish(4.0) == (0, 0.0)
    assert link.next_end() == (0, 8.0)  # ends with 1, and was added before
    link.drop(6.0, 0)
    assert link.next_end() == (1, 7.0)
    link.drop(6.5, 1)
    assert link.next_end() is None
