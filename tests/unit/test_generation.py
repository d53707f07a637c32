"""Generations, and the choice of the replicas to believe."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lhblock.errors import ReplicaForeign, ReplicaStale
from lhblock.replica import (
    OPENED,
    UNSERVED,
    Generation,
    HeadFingerprint,
    choose,
    new_set,
    supersede,
)
from lhblock.replica._generation import HISTORY_MAX
from lhblock.replica._metadata import MalformedError

T = "2026-11-23T08:46:13Z"


@dataclass
class Found:
    generation: Generation | None
    label: str = "/r"
    written_elsewhere: str = ""


def found(*generations: Generation | None) -> list[Found]:
    return [Found(each, f"/r{index}") for index, each in enumerate(generations)]


def leave(survivors: list[Generation], *left: Generation) -> list[Generation]:
    names = [each.replica_id for each in left]
    return list(supersede(survivors, left=names, reason="write failed", time=T))


def test_a_generation_survives_a_round_trip() -> None:
    a, b, c = new_set(3, time=T)
    (next_a, _) = leave([a, b], c)
    next_a = replace(next_a, head=HeadFingerprint("volume-head-000.img", 4096, 123, 8))
    assert Generation.parse(next_a.encode()) == next_a


def test_a_flipped_bit_is_noticed() -> None:
    (one,) = new_set(1, time=T)
    data = one.encode().replace(b'"counter":1', b'"counter":3')
    with pytest.raises(MalformedError, match="does not match its checksum"):
        Generation.parse(data)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["crc32", "payload", "version"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_file_makes_the_reader_fail_in_another_way(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Generation.parse(data)


def test_replicas_of_one_generation_are_all_believed() -> None:
    choice = choose(found(*new_set(3, time=T)))
    assert (choice.newest, choice.lagging, choice.stale) == ((0, 1, 2), (), ())


def test_a_replica_left_behind_is_stale_and_the_reason_is_told() -> None:
    a, b, c = new_set(3, time=T)
    a, c = leave([a, c], b)
    choice = choose(found(a, b, c))
    assert choice.newest == (0, 2)
    assert choice.lagging == ()
    (stale,) = choice.stale
    assert stale.index == 1
    assert "write failed" in stale.reason
    assert "generation 1 while 2 is the newest" in stale.reason


def test_a_survivor_the_fence_did_not_reach_is_lagging_not_stale() -> None:
    a, b, c, d = new_set(4, time=T)
    new_a, new_b, _ = leave([a, b, c], d)
    new_a = new_a.with_agreement([d.replica_id])
    choice = choose(found(new_a, new_b, c, d))
    assert choice.newest == (0, 1)
    assert choice.lagging == (2,)
    assert [each.index for each in choice.stale] == [3]
    assert choice.doubt == ""


def test_a_fence_that_reached_too_few_leaves_nobody_behind() -> None:
    a, b, c = new_set(3, time=T)
    new_a, _ = leave([a, b], c)
    choice = choose(found(new_a, b, c))
    assert choice.newest == (0,)
    assert choice.lagging == (1, 2)
    assert set(choice.members) == {each.replica_id for each in (a, b, c)}
    assert choose(found(new_a, c)).doubt
    assert choose(found(new_a)).doubt
    assert choose(found(b, c)).doubt == ""


def test_one_that_others_went_on_without_does_not_speak_for_them() -> None:
    a, b, c = new_set(3, time=T)
    (alone,) = leave([a], b, c)
    told = replace(alone, replica_id=b.replica_id)
    assert choose(found(told)).newest == ()
    choice = choose(found(told, c, a))
    assert choice.newest == (1, 2)
    assert "goes on without it" in choice.stale[0].reason


def test_a_survivor_two_generations_behind_is_stale() -> None:
    a, b, c = new_set(3, time=T)
    a, _ = leave([a, b], c)
    (a,) = leave([a], b)
    choice = choose(found(a, b, c))
    assert choice.newest == (0,)
    assert [each.index for each in choice.stale] == [1, 2]


def test_replicas_that_went_on_separately_are_a_split() -> None:
    a, b = new_set(2, time=T)
    (alone_a,), (alone_b,) = leave([a], b), leave([b], a)
    with pytest.raises(ReplicaStale, match="each written without the other since generation 1"):
        choose(found(alone_a, alone_b))


def test_a_split_is_noticed_after_one_side_has_gone_further() -> None:
    a, b = new_set(2, time=T)
    (alone_a,) = leave([a], b)
    (alone_b,) = leave([b], a)
    (alone_b,) = supersede([alone_b], left=[], reason="more", time=T)
    assert alone_b.counter > alone_a.counter
    with pytest.raises(ReplicaStale):
        choose(found(alone_a, alone_b))


def test_of_three_that_went_apart_the_minority_is_stale() -> None:
    a, b, c = new_set(3, time=T)
    (alone_a,) = leave([a], b, c)
    new_b, new_c = leave([b, c], a)
    choice = choose(found(alone_a, new_b, new_c))
    assert choice.newest == (1, 2)
    assert "too few to count" in choice.stale[0].reason
    by_force = alone_a.with_agreement(a.members)
    with pytest.raises(ReplicaStale):
        choose(found(by_force, new_b, new_c))


def test_replicas_of_different_volumes_are_refused() -> None:
    with pytest.raises(ReplicaForeign, match="belongs to volume"):
        choose(found(*new_set(1, time=T), *new_set(1, time=T)))


def test_a_copied_directory_is_refused() -> None:
    (one,) = new_set(1, time=T)
    with pytest.raises(ReplicaForeign, match="/r1: is a copy of /r0"):
        choose(found(one, one))


def test_a_missing_generation_is_allowed_alone_and_for_all_only() -> None:
    assert choose(found(None)).newest == (0,)
    assert choose(found(None, None)).newest == (0, 1)
    (one, _) = new_set(2, time=T)
    with pytest.raises(ReplicaForeign, match=r"/r1: has no lhblock\.generation"):
        choose(found(one, None))


def test_a_foreign_write_to_some_of_the_newest_is_refused_and_to_all_accepted() -> None:
    a, b = new_set(2, time=T)
    both = [Found(a, "/a", "another program wrote"), Found(b, "/b")]
    with pytest.raises(ReplicaStale, match="another program wrote, but not /b"):
        choose(both)
    both[1].written_elsewhere = "another program wrote"
    assert choose(both).newest == (0, 1)


def test_a_joined_replica_becomes_a_member() -> None:
    (a,) = new_set(1, time=T)
    _, b = new_set(2, time=T)
    joined = replace(b, volume_id=a.volume_id)
    (next_a,) = supersede([a], left=[], reason="joined", time=T, joined=[joined.replica_id])
    assert next_a.members == (a.replica_id, joined.replica_id)


def test_the_history_is_bounded_and_old_generations_stay_stale() -> None:
    a, b = new_set(2, time=T)
    (now,) = leave([a], b)
    for _ in range(2 * HISTORY_MAX):
        (now,) = leave([now])
    assert len(now.history) == HISTORY_MAX
    assert now.history[-1].uuid == now.generation
    assert [each.index for each in choose(found(now, b)).stale] == [1]


def test_a_copy_that_kept_whole_seconds_is_no_foreign_write() -> None:
    before = HeadFingerprint("h", 4096, 5_000_000_123, 8)
    assert before.matches(replace(before, mtime_ns=5_000_000_000))
    assert not before.matches(replace(before, mtime_ns=5_000_000_124))
    assert not before.matches(replace(before, mtime_ns=6_000_000_000))
    assert not before.matches(replace(before, blocks=16))


def test_a_generation_that_was_never_served_may_be_missing_on_some() -> None:
    one, _ = new_set(2, time=T, counter=UNSERVED)
    assert choose(found(one, None)).newest == (0, 1)
    served = leave([one])
    with pytest.raises(ReplicaForeign, match=r"has no lhblock\.generation"):
        choose(found(*served, None))


def test_opening_often_does_not_push_a_split_out_of_the_history() -> None:
    a, b = new_set(2, time=T)
    (alone_a,), (alone_b,) = leave([a], b), leave([b], a)
    for _ in range(2 * HISTORY_MAX):
        (alone_a,) = supersede([alone_a], left=[], reason=OPENED, time=T)
    assert len(alone_a.history) == 3
    (alone_b,) = supersede([alone_b], left=[], reason=OPENED, time=T)
    with pytest.raises(ReplicaStale, match="each written without the other"):
        choose(found(alone_a, alone_b))
