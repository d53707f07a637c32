"""Reading and writing ``volume.meta`` and disk records."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lhblock.errors import UsageError
from lhblock.replica import Disk, check_snapshot_name, created_text, why_bad_size
from lhblock.replica._metadata import (
    MalformedError,
    VolumeMeta,
    encode_disk,
    encode_volume,
    parse_disk,
    parse_volume,
    walk_up,
)
from lhblock.replica._names import discard_name, image_of_discard, next_head, why_unusable

IMAGE = "volume-snap-s1.img"

# As observed in a directory of the reference, see the format's specification.
VOLUME_LINE = (
    b'{"Size":67108864,"Head":"volume-head-001.img","Dirty":true,"Rebuilding":false,"Error":"",'
    b'"Parent":"volume-snap-snap1.img","SectorSize":512,"BackingFilePath":"","Encrypted":false}\n'
)


def test_volume_meta_is_written_byte_for_byte_as_longhorn_does_but_for_our_mark() -> None:
    meta = parse_volume(VOLUME_LINE)
    assert meta == VolumeMeta(
        size_bytes=67108864, head="volume-head-001.img", dirty=True, parent="volume-snap-snap1.img"
    )
    marked = VOLUME_LINE.replace(b"}", b',"Lhblock":true}')
    assert encode_volume(meta) == marked
    assert parse_volume(marked).ours


def test_a_record_is_written_with_sorted_labels_and_go_escapes() -> None:
    disk = Disk(IMAGE, labels={"k<1>": "a&b\u2028", "foo.bar/baz": "qüx"}, created="c")
    assert (
        encode_disk(disk)
        == (
            '{"Name":"volume-snap-s1.img","Parent":"","Removed":false,"UserCreated":false,'
            '"Created":"c","Labels":{"foo.bar/baz":"qüx","k\\u003c1\\u003e":"a\\u0026b\\u2028"}}\n'
        ).encode()
    )
    assert parse_disk(IMAGE, encode_disk(disk)) == disk


def test_no_labels_are_null() -> None:
    assert encode_disk(Disk(IMAGE)).endswith(b'"Labels":null}\n')


@pytest.mark.parametrize(
    "data",
    [
        b'{"Parent":""}',
        b'  \n{"parent":null} trailing {',
        b'{"PARENT":"","Unknown":[1,{"x":2}],"Labels":null}',
        b'{"Name":"volume-head-000.img"}',
    ],
    ids=["short", "trailing", "case", "stale name"],
)
def test_reading_is_as_tolerant_as_go(data: bytes) -> None:
    assert parse_disk(IMAGE, data) == Disk(IMAGE)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"Size":NaN}', "is not JSON"),
        (b"[]", "a JSON list instead of an object"),
        (b'{"Size":"1"}', "Size = '1', which is no integer"),
        (b'{"Size":true}', "Size = True, which is no integer"),
        (b'{"Size":1.5}', "Size = 1.5, which is no integer"),
        (b'{"Size":9223372036854775808}', "Size of more than 64 bits"),
        (b'{"Size":4096}', "Head = '', which names no head image"),
        (b'{"Head":"volume-snap-a.img"}', "which names no head image"),
        (b'{"Head":"../volume-head-000.img"}', "which names no head image"),
        (b'{"Head":"volume-head-000.img","Dirty":1}', "Dirty = 1, which is neither"),
        (b'{"Head":"volume-head-000.img","Error":1}', "Error = 1, which is no text"),
        (b'{"Head":"volume-head-000.img","Parent":"volume-head-001.img"}', "no snapshot image"),
        (b'{"Head":"volume-head-000.img","Parent":"volume-snap-a/b.img"}', "holds a '/'"),
    ],
)
def test_a_damaged_volume_meta_is_refused_with_the_value(data: bytes, sentence: str) -> None:
    with pytest.raises(MalformedError) as caught:
        parse_volume(data)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "data", [b'{"Labels":[]}', b'{"Labels":{"a":1}}', b'{"Removed":"no"}', b'{"Parent":"x.img"}']
)
def test_a_damaged_record_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_disk(IMAGE, data)


@given(
    st.binary(max_size=200)
    | st.dictionaries(
        st.sampled_from(["Size", "Head", "DIRTY", "Parent", "Labels", "Removed", "x"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=3),
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_input_makes_the_readers_fail_in_another_way(data: bytes) -> None:
    for read in (parse_volume, lambda each: parse_disk(IMAGE, each)):
        with contextlib.suppress(MalformedError):
            read(data)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_text_survives_a_round_trip(labels: dict[str, str], created: str) -> None:
    disk = Disk(IMAGE, labels=labels, created=created)
    assert parse_disk(IMAGE, encode_disk(disk)) == disk


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    assert parse_disk(IMAGE, b'{"Created":"x\\ud800"}').created == "x\ufffd"


@pytest.mark.parametrize(
    ("head", "following"),
    [("000", "001"), ("009", "010"), ("010", "001"), ("003", "004"), ("1234", "005")],
)
def test_only_the_last_digit_of_a_head_counts(head: str, following: str) -> None:
    assert next_head(f"volume-head-{head}.img") == f"volume-head-{following}.img"


@pytest.mark.parametrize("size_bytes", [0, -4096, 4095, 4097, 512, 1 << 63, (1 << 63) + 4096])
def test_a_size_that_cannot_be_is_explained(size_bytes: int) -> None:
    assert why_bad_size(size_bytes)


def test_sizes_up_to_the_largest_file_are_fine() -> None:
    assert why_bad_size(4096) is None
    assert why_bad_size((1 << 63) - 4096) is None


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", "a b", "ä", "x.meta", "my-volume-head", "x\0", "n" * 201, "a\n"]
)
def test_a_bad_name_for_a_new_snapshot_is_a_usage_error(name: str) -> None:
    if name == "..":
        check_snapshot_name(name)  # "volume-snap-...img" is a harmless file name
        return
    with pytest.raises(UsageError):
        check_snapshot_name(name)


@pytest.mark.parametrize("name", ["a", "1.2-x_y", "n" * 200, "X.tmp"])
def test_a_good_name_passes(name: str) -> None:
    check_snapshot_name(name)


def test_odd_names_from_longhorn_are_taken_when_no_file_of_theirs_is_misread() -> None:
    assert why_unusable("volume-snap-my snap: ü.img") is None
    assert why_unusable("volume-snap-x.meta.img")
    assert why_unusable("volume-snap-volume-head.img")
    assert why_unusable(f"volume-snap-{'n' * 240}.img")


def test_discard_names_lead_back_to_their_images() -> None:
    for image in ("volume-head-003.img", IMAGE, "volume-snap-a.tmp.img"):
        assert image_of_discard(discard_name(image)) == image
        assert "volume-head" not in discard_name(image)
    assert image_of_discard("lhblock.generation") is None
    assert image_of_discard("lhblock.discard.x") is None


def test_a_circle_of_parents_is_named() -> None:
    disks = {name: Disk(name, parent=parent) for name, parent in (("a", "b"), ("b", "a"))}
    with pytest.raises(MalformedError, match="a circle"):
        list(walk_up(disks, "a"))


def test_a_missing_parent_is_named() -> None:
    with pytest.raises(MalformedError, match="Parent = 'b', which is missing"):
        list(walk_up({"a": Disk("a", parent="b")}, "a"))


def test_times_are_utc_with_whole_seconds() -> None:
    assert created_text(1795423573.9) == "2026-11-23T08:46:13Z"
