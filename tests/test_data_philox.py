"""Random numbers: Philox4x32-10 itself, and that a draw depends on (seed, sample, view, purpose) alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coursepack.data.jit_philox import philox_fill
from coursepack.data.randomness import Purpose, below, random_words, shuffled

U32 = st.integers(0, 2**32 - 1)

# The published known answers of Random123 (kat_vectors, philox4x32, 10 rounds): counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox(counter, key):
    """Philox4x32-10 in plain Python integers, from figure 2 of Salmon et al. (SC 2011)."""
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    for turn in range(10):
        high_a, low_a = divmod(left[0] * 0xD2511F53, 2**32)
        high_b, low_b = divmod(left[1] * 0xCD9E8D57, 2**32)
        round_keys = (key[0] + turn * 0x9E3779B9) % 2**32, (key[1] + turn * 0xBB67AE85) % 2**32
        left = [high_b ^ right[0] ^ round_keys[0], high_a ^ right[1] ^ round_keys[1]]
        right = [low_b, low_a]
    return [left[0], right[0], left[1], right[1]]


def compiled(counters, key):
    counters = np.array(counters, dtype=np.uint32)
    out = np.empty_like(counters)
    philox_fill(counters, np.uint64(key[0]), np.uint64(key[1]), out)
    return out.tolist()


def words_of(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
@pytest.mark.parametrize("generator", [philox, lambda counter, key: compiled([counter], key)[0]])
def test_known_answers(generator, counter, key, output):
    assert generator(words_of(counter), words_of(key)) == words_of(output)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(U32, U32, U32, U32), min_size=1, max_size=5), st.tuples(U32, U32))
def test_compiled_equals_plain_python(counters, key):
    assert compiled(counters, key) == [philox(counter, key) for counter in counters]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), U32, U32)
def test_counter_and_key_are_sample_view_purpose_and_seed(seed, sample, view, purpose):
    counter = [sample % 2**32, sample >> 32, view, purpose]
    expected = philox(counter, [seed % 2**32, seed >> 32])
    assert random_words(seed, np.array([sample]), view, purpose).tolist() == [expected]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(40)), st.integers(1, 40))
def test_draws_depend_on_nothing_drawn_beside_them(order, chunk):
    whole = random_words(3, np.arange(40), 2, Purpose.VIEW)
    order = np.array(order)
    pieces = [random_words(3, order[i : i + chunk], 2, Purpose.VIEW) for i in range(0, 40, chunk)]
    assert np.array_equal(np.concatenate(pieces), whole[order])


def test_every_part_of_the_key_matters():
    # Grain keys Philox by seed + index: there (7, sample 3) and (8, sample 2) are one stream.
    def draw(seed, sample, view=0, purpose=Purpose.VIEW):
        return random_words(seed, np.array([sample]), view, purpose)[0].tolist()

    draws = [draw(7, 3), draw(8, 2), draw(7, 2), draw(8, 3), draw(7, 3, view=1), draw(7, 4, view=0)]
    draws += [draw(7, 3, purpose=Purpose.ORDER), draw(7, 3, purpose=Purpose.VIEW + 1)]
    draws += [draw(7 + 2**32, 3), draw(7, 3 + 2**32), draw(7, 3, view=3), draw(3, 7)]
    assert len({tuple(words) for words in draws}) == len(draws)


def test_samples_beyond_32_bits_are_distinct_and_right():
    samples = np.array([5, 5 + 2**32, 5 + 2**40], dtype=np.int64)
    words = random_words(1, samples, 0, Purpose.VIEW).tolist()
    assert words == [philox([5, high, 0, Purpose.VIEW], [1, 0]) for high in (0, 1, 256)]


def test_nothing_drawn_for_no_samples():
    assert random_words(0, np.empty(0, dtype=np.int64), 0, Purpose.ORDER).shape == (0, 4)


@pytest.mark.parametrize(
    ("seed", "view", "purpose", "text"),
    [
        (-1, 0, 1, r"seed is -1, expected 0 to 2\*\*64 - 1"),
        (2**64, 0, 1, r"seed is 18446744073709551616, expected 0 to 2\*\*64 - 1"),
        (0, -1, 1, r"view is -1, expected 0 to 2\*\*32 - 1"),
        (0, 2**32, 1, r"view is 4294967296, expected 0 to 2\*\*32 - 1"),
        (0, 0, -1, r"purpose is -1, expected 0 to 2\*\*32 - 1"),
    ],
)
def test_numbers_out_of_range_are_refused(seed, view, purpose, text):
    with pytest.raises(ValueError, match=text):
        random_words(seed, np.arange(3), view, purpose)


@settings(max_examples=40, deadline=None)
@given(st.lists(U32, min_size=1, max_size=20), st.integers(1, 2**32))
def test_below_is_the_high_word_of_the_product(words, bound):
    drawn = below(np.array(words, dtype=np.uint32), bound)
    assert drawn.tolist() == [word * bound // 2**32 for word in words]
    assert drawn.dtype == np.int64
    assert 0 <= drawn.min() <= drawn.max() < bound


@pytest.mark.parametrize("bound", [2, 3, 9, 1000])
def test_below_is_roughly_uniform_in_every_word(bound):
    words = random_words(11, np.arange(200_000), 0, Purpose.VIEW)
    for place in range(4):
        counts = np.bincount(below(words[:, place], bound), minlength=bound)
        assert len(counts) == bound
        expected = 200_000 / bound
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        # Five standard deviations of chi squared with bound - 1 degrees of freedom.
        assert chi_squared < bound - 1 + 5 * np.sqrt(2 * bound)


@pytest.mark.parametrize("count", [511, 512, 513, 1300])
@pytest.mark.parametrize("streams", [1, 3])
def test_words_of_a_sample_do_not_depend_on_the_others(count, streams):
    samples = np.random.default_rng(count).integers(0, 1 << 40, count)
    words = random_words(1 << 40, samples, 7, Purpose.VIEW, streams)
    for index in (0, 1, 255, 510, count - 2, count - 1):
        for stream in range(streams):
            alone = random_words(1 << 40, samples[index : index + 1], 7, Purpose.VIEW + (stream << 16))
            assert np.array_equal(words[index, 4 * stream : 4 * stream + 4], alone[0])


def test_shuffled_is_a_permutation_that_subsets_share():
    samples = np.arange(500)
    order = shuffled(samples, 4, 1, Purpose.ORDER)
    assert not np.array_equal(order, samples)
    assert np.array_equal(np.sort(order), samples)
    chosen = np.random.default_rng(0).permutation(500)[:120]
    expected = order[np.isin(order, chosen)]
    assert np.array_equal(shuffled(chosen, 4, 1, Purpose.ORDER), expected)


def test_shuffled_depends_on_seed_view_and_purpose():
    keys = [(4, 1, Purpose.ORDER), (5, 1, Purpose.ORDER), (4, 2, Purpose.ORDER), (4, 1, Purpose.SPLIT)]
    orders = {tuple(shuffled(np.arange(100), *key).tolist()) for key in keys}
    assert len(orders) == len(keys)
