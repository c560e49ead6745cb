"""The index against a plain model: what is known, how big it is, in which order it was used."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.images.index import Entry, ImageIndex, big_entry, found_images, small_entry

ids = st.integers(0, 12).map(lambda number: SliceId(number * 0x1_0000_0001))
entries = st.one_of(
    st.builds(small_entry, st.integers(1, MIB), st.integers(0, 2**32 - 1)),
    st.integers(1, 2**32 - 1).flatmap(lambda length: st.builds(big_entry, st.just(length), st.integers(0, length))),
)


class Step(NamedTuple):
    """One thing done to the index."""

    verb: str
    slice_id: SliceId
    entry: Entry


steps = st.lists(
    st.builds(Step, st.sampled_from(["put", "put", "touch", "remove", "evict"]), ids, entries), max_size=120
)


@settings(max_examples=200)
@given(
    found=st.dictionaries(ids, entries, max_size=20), early=steps, late=steps, recent_limit=st.sampled_from([2, 6, 100])
)
def test_it_agrees_with_a_model(
    found: dict[SliceId, Entry], early: list[Step], late: list[Step], recent_limit: int
) -> None:
    index = ImageIndex(recent_limit=recent_limit)
    model: dict[SliceId, Entry] = {}
    removed: set[SliceId] = set()

    def play(steps: list[Step]) -> None:
        for verb, slice_id, entry in steps:
            if verb == "put":
                model[slice_id] = entry
                index.put(slice_id, entry)
            elif verb == "touch":
                index.touch(slice_id)
            elif verb == "remove":
                removed.add(slice_id)
                assert index.remove(slice_id) == model.pop(slice_id, None)
            else:
                oldest = index.oldest()
                assert (oldest is None) == (not model)
                if oldest is not None:
                    assert model.pop(oldest[0]) == oldest[1]
                    removed.add(oldest[0])
                    index.remove(oldest[0])
            assert len(index) == len(model)
            assert index.space_bytes == sum(entry.space_bytes for entry in model.values())

    play(early)
    gone = index.load(found_images(found.items()))
    assert index.is_loaded
    assert dict(gone) == {
        slice_id: found[slice_id] for slice_id in found if slice_id in removed and slice_id not in model
    }
    for slice_id, entry in found.items():
        if slice_id not in removed:
            model.setdefault(slice_id, entry)
    play(late)
    for slice_id, entry in model.items():
        assert index.get(slice_id) == entry
        assert slice_id in index


def test_the_order_of_use_is_exact_while_all_are_recent_and_what_was_found_comes_first() -> None:
    index = ImageIndex()
    for number in range(10):
        index.put(SliceId(number), small_entry(100, number))
    index.load(found_images([(SliceId(99), small_entry(1, 1)), (SliceId(50), big_entry(MIB, MIB))]))
    index.touch(SliceId(0))
    index.touch(SliceId(50))
    index.touch(SliceId(12345))
    order = []
    while (oldest := index.oldest()) is not None:
        order.append(oldest[0])
        index.remove(oldest[0])
    assert order == [99, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 50]


def test_entries_say_how_much_space_images_take() -> None:
    assert small_entry(1, 0).space_bytes == 4 * KIB
    assert small_entry(4 * KIB + 1, 0).space_bytes == 8 * KIB
    assert big_entry(10 * MIB, 3 * MIB).space_bytes == 3 * MIB + 4 * KIB
    assert big_entry(10 * MIB, 0).space_bytes == 4 * KIB
