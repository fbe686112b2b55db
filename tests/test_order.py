import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indistill.config import UserError
from indistill.order import SampleOrder


def epoch_ids(order, epoch, global_batch):
    return np.concatenate(
        [order.batch(epoch, t, global_batch) for t in range(order.steps_per_epoch(global_batch))]
    )


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def cases(draw):
    """Draw an order with a valid global batch: shards of any size, any streams and window."""
    sizes = draw(st.lists(st.integers(0, 120), min_size=1, max_size=25).filter(sum))
    streams = draw(st.integers(1, min(12, sum(sizes))))
    global_batch = streams * draw(st.integers(1, sum(sizes) // streams))
    seed, window = draw(st.integers(0, 2**64)), draw(st.integers(1, 200))
    order = SampleOrder(sizes, seed, streams=streams, window=window)
    return order, global_batch, draw(st.integers(0, 1000))


def fresh(order):
    options = ("streams", "window", "repeats", "paired", "cycle")
    return SampleOrder(order.sizes, order.seed, **{name: getattr(order, name) for name in options})


@settings(max_examples=150, deadline=None)
@given(cases())
def test_an_epoch_covers_all_but_the_dropped_once(case):
    order, global_batch, epoch = case
    ids = epoch_ids(order, epoch, global_batch)
    assert ids.dtype == np.int64
    assert len(ids) == order.steps_per_epoch(global_batch) * global_batch
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < order.num_samples == sum(order.sizes)
    assert order.num_samples - len(ids) == order.dropped(global_batch) < global_batch


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_every_world_size_and_resume_point_sees_the_same(case, data):
    order, global_batch, epoch = case
    uninterrupted = [order.batch(epoch, t, global_batch) for t in range(order.steps_per_epoch(global_batch))]
    step = data.draw(st.integers(0, len(uninterrupted) - 1))
    for world in divisors(order.streams):
        slices = [fresh(order).rank_batch(epoch, step, global_batch, rank, world) for rank in range(world)]
        assert {len(piece) for piece in slices} == {global_batch // world}
        assert np.array_equal(np.concatenate(slices), uninterrupted[step])
    # Another world size from another step on, with an object that was used for other epochs before.
    world = data.draw(st.sampled_from(divisors(order.streams)))
    order.batch(epoch + 1, 0, global_batch)
    for t in range(step, len(uninterrupted)):
        slices = [order.rank_batch(epoch, t, global_batch, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(slices), uninterrupted[t])


@settings(max_examples=50, deadline=None)
@given(cases(), st.data())
def test_the_order_of_a_stream_does_not_depend_on_the_global_batch(case, data):
    """A run resumed with another global batch, at a common sample count, reads the samples not yet seen."""
    order, global_batch, epoch = case
    whole = epoch_ids(order, epoch, global_batch).reshape(-1, order.streams, global_batch // order.streams)
    single = epoch_ids(order, epoch, order.streams).reshape(-1, order.streams, 1)
    for stream in range(order.streams):
        joined = whole[:, stream].ravel()
        assert np.array_equal(joined, single[: len(joined), stream].ravel())


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_partners_are_neighbours_on_every_world_size(case, data):
    order, _, epoch = case
    order.paired = True
    order.cycle = data.draw(st.sampled_from([None, 1, 3]))
    pairs = order.span // 2
    partners = order.partners(epoch)
    assert np.array_equal(partners[partners], np.arange(order.num_samples))
    assert (partners == np.arange(order.num_samples)).sum() == order.num_samples - 2 * pairs * order.streams
    if not pairs:
        return
    global_batch = 2 * order.streams * data.draw(st.integers(1, pairs))
    world = data.draw(st.sampled_from(divisors(order.streams)))
    later = epoch if order.cycle is None else epoch + order.cycle
    for rank in range(world):
        ids = fresh(order).rank_batch(later, 0, global_batch, rank, world)
        assert np.array_equal(partners[ids].reshape(-1, 2), ids.reshape(-1, 2)[:, ::-1])


def test_partners_change_with_the_epoch_and_are_of_all_shards_of_the_window():
    order = SampleOrder([10] * 40, 0, streams=4, window=1000, paired=True)
    shards = np.arange(400) // 10
    partners = [order.partners(epoch) for epoch in range(50)]
    assert len({tuple(of_epoch) for of_epoch in partners}) == 50
    # A partner is any of the other 99 samples of the stream, of which 9 are in the same shard, or fewer where
    # a stream ends within it.
    same = np.mean([(shards[of_epoch] == shards) & (of_epoch != np.arange(400)) for of_epoch in partners])
    assert same == pytest.approx(9 / 99, abs=0.015)


def test_a_share_that_does_not_divide_names_what_does():
    order = SampleOrder([1000], 0, streams=32, paired=True)
    message = (
        r"^kd.mix \(pairs\): data.global_batch / data.streams \(3\) must be divisible by 2. "
        r"With data.streams 32: global batches that are multiples of 64. "
        r"With global batch 96 on 8 ranks: data.streams 8, 16, 24$"
    )
    with pytest.raises(UserError, match=message):
        order.check(96, 8)
    for streams in (8, 16, 24):
        order.streams = streams
        order.check(96, 8)


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_repeats_show_the_samples_of_a_smaller_batch_several_times(case, data):
    order, smaller, epoch = case
    repeated = fresh(order)
    repeated.repeats = data.draw(st.integers(1, 4))
    global_batch = repeated.repeats * smaller
    if global_batch > order.num_samples:
        return
    world = data.draw(st.sampled_from(divisors(order.streams)))
    steps = repeated.steps_per_epoch(global_batch)
    assert steps == order.num_samples // global_batch
    assert order.num_samples - steps * smaller == repeated.dropped(global_batch)
    share = global_batch // order.streams
    for step in range(steps):
        slices = [repeated.rank_batch(epoch, step, global_batch, rank, world) for rank in range(world)]
        streams = np.concatenate(slices).reshape(order.streams, share)
        numbers = repeated.repeat_of(np.arange(global_batch), global_batch).reshape(order.streams, share)
        plain = order.batch(epoch, step, smaller).reshape(order.streams, -1)
        for repeat in range(repeated.repeats):
            assert np.array_equal(streams[numbers == repeat].reshape(order.streams, -1), plain)
        row = data.draw(st.integers(0, global_batch - 1))
        stream, place = repeated.place_of(step, row, global_batch)
        assert repeated.stream_sample(epoch, stream, place) == streams.ravel()[row]


def test_repeats_that_do_not_divide_are_refused():
    order = SampleOrder([1000], 0, streams=8, repeats=3, paired=True)
    order.check(48, 1)
    message = (
        r"^data.repeats \(3\) and kd.mix \(pairs\): .* \(3\) must be divisible by 6. .*data.streams 1, 2, 4$"
    )
    with pytest.raises(UserError, match=message):
        order.check(24, 1)


def test_epochs_and_seeds_differ_and_drop_others():
    orders = [
        epoch_ids(SampleOrder([700, 300, 500], seed, streams=4, window=64), epoch, 64)
        for seed in (0, 1, 2**32)
        for epoch in (0, 1)
    ]
    assert len({ids.tobytes() for ids in orders}) == 6
    assert len({frozenset(range(1500)) - frozenset(ids) for ids in orders}) == 6
    # With a single shard, too, no sample is left out forever.
    single = SampleOrder([1030], 0, streams=8, window=32)
    assert set(np.concatenate([epoch_ids(single, epoch, 64) for epoch in range(3)])) == set(range(1030))


def test_the_order_is_frozen():
    """A checkpoint stores only the step, so a changed order would resume old runs on wrong samples."""
    assert SampleOrder([5, 9, 4, 30], seed=3, streams=4, window=6).batch(2, 1, 8).tolist() == [
        3,
        0,
        13,
        12,
        27,
        35,
        45,
        46,
    ]
    assert SampleOrder([100] * 10, 0).batch(0, 0, 64).sum() == 32763


def test_a_shard_is_not_read_by_ranks_that_do_not_own_its_stream():
    order = SampleOrder([100] * 64, 0, streams=16, window=50)
    shards = [
        {int(i) // 100 for t in range(order.steps_per_epoch(64)) for i in order.rank_batch(0, t, 64, rank, 4)}
        for rank in range(4)
    ]
    assert all(len(mine) <= 64 // 4 + 1 for mine in shards)  # a quarter of the shards, and one that is cut


@pytest.mark.parametrize(
    ("global_batch", "world", "words"),
    [
        (128, 6, ["world size (6)", "1, 2, 4, 8, 16, 32, 64", "data.streams none"]),
        (100, 2, ["data.global_batch (100)", "64, 128", "data.streams 2, 4, 10, 20, 50, 100"]),
        (96, 3, ["world size (3)", "data.streams 3, 6, 12, 24, 48, 96"]),
        (6400, 1, ["data.global_batch (6400)", "5000 samples"]),
    ],
)
def test_what_cannot_be_served_names_what_can(global_batch, world, words):
    order = SampleOrder([1000] * 5, 0)
    for refused in (order.check, lambda g, w: order.rank_batch(0, 0, g, 0, w)):
        with pytest.raises(UserError) as error:
            refused(global_batch, world)
        assert all(word in str(error.value) for word in words), error.value
        assert "\n" not in str(error.value)


def test_a_suggestion_works():
    SampleOrder([1000] * 5, 0, streams=50).check(100, 2)
    with pytest.raises(IndexError):
        SampleOrder([1000] * 5, 0).batch(0, 5000 // 128, 128)


def test_any_of_fourteen_million_samples_is_little_work(monkeypatch):
    """Nothing is stored per sample; a batch shuffles only the shards and a window or two of each stream."""
    sizes = np.random.RandomState(0).randint(1400, 2018, 8192)
    tracemalloc.start()
    order = SampleOrder(sizes, 0)
    order.batch(0, 0, 4096)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.num_samples > 13_900_000
    assert peak_bytes < 20e6
    shuffles = []
    random = SampleOrder._random
    monkeypatch.setattr(SampleOrder, "_random", lambda *counters: shuffles.append(1) or random(*counters))
    steps = np.random.RandomState(1).randint(order.steps_per_epoch(4096), size=30)
    for epoch, step in enumerate(steps):  # each in another epoch, so that no cache helps
        order.batch(epoch, int(step), 4096)
    assert len(shuffles) <= 30 * (1 + 2 * order.streams)


def test_512_ranks_share_an_epoch_of_imagenet():
    sizes = np.diff(np.linspace(0, 1_281_167, 1025).astype(int))
    world, global_batch = 512, 512 * 250
    whole = SampleOrder(sizes, 7, streams=512)
    tracemalloc.start()
    ranks = [SampleOrder(sizes, 7, streams=512) for _ in range(world)]
    shares = []
    for step in range(whole.steps_per_epoch(global_batch)):
        shares.append([ranks[rank].rank_batch(2, step, global_batch, rank, world) for rank in range(world)])
    kept = tracemalloc.get_traced_memory()[0] - sum(ids.nbytes for step in shares for ids in step)
    tracemalloc.stop()
    ids = np.concatenate([np.concatenate(step) for step in shares])
    assert len(ids) == 1_281_167 // global_batch * global_batch
    assert len(np.unique(ids)) == len(ids)
    for step in (0, len(shares) - 1):
        assert np.array_equal(np.concatenate(shares[step]), whole.batch(2, step, global_batch))
    # A rank keeps a window of its one stream, and four numbers of each shard.
    assert kept / world < 8 * (1_281_167 // 512 + 5 * 1024) + 10_000


def clumping(batches, shard_size):
    """Shuffle quality: for a sample drawn from a batch, the number of its samples from the same shard.

    batches: int64 [batches, B] of sample ids. With n_s samples of shard s in a batch, the quality is the mean
    of `sum(n_s^2) / B`. It is also B times the variance of a batch's mean if every shard has an independent
    value of unit variance. A full shuffle has 1 + (B - 1) * (shard_size - 1) / (N - 1); a batch from one
    shard has B.
    """
    return np.mean([(np.bincount(ids // shard_size) ** 2).sum() / len(ids) for ids in batches])


def test_shuffle_quality():
    """ImageNet's size: 1,000 shards of 1,281 samples, global batches of 4,096."""
    shards, size, batch = 1000, 1281, 4096
    total = shards * size
    full = clumping(np.random.RandomState(0).permutation(total)[: 312 * batch].reshape(312, batch), size)
    assert full == pytest.approx(1 + (batch - 1) * (size - 1) / (total - 1), rel=0.02)

    def ours(window):
        order = SampleOrder([size] * shards, 0, window=window)
        return clumping([order.batch(0, t, batch) for t in range(0, 312, 3)], size)

    # A plain WebDataset pipeline: shards in random order through a shuffle buffer of 1,000 samples.
    random = np.random.RandomState(0)
    stream = np.concatenate([np.arange(size) + s * size for s in random.permutation(shards)[:40]])
    buffer, plain = stream[:1000].copy(), []
    for incoming, place in zip(stream[1000:], random.randint(1000, size=len(stream))):
        plain.append(buffer[place])
        buffer[place] = incoming
    buffered = clumping(np.reshape(plain[: 12 * batch], (12, batch)), size)

    default, whole_span = ours(None), ours(total)
    print(
        f"clumping: full {full:.1f}, window of a span {whole_span:.1f}, default {default:.1f}, "
        f"buffer {buffered:.0f}"
    )
    assert whole_span < 1.1 * full
    assert default < 5 * full
    assert buffered > 100 * full
