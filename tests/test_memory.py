"""ddpg.py's replay memory and its file."""

import re
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpg
from ddpg import Args, ReplayBuffer


def transition(number: int) -> tuple:
    """The transition of this number, all of whose parts tell it."""
    s = np.array([number, number + 0.25], np.float32)
    return s, np.array([-number, 0.5, number]), 10.0 * number, s + 1, number % 3 == 0


def fill(buffer: ReplayBuffer, numbers) -> ReplayBuffer:
    for number in numbers:
        buffer.add(*transition(number))
    return buffer


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.lists(st.tuples(st.integers(-4, 4), st.lists(st.integers(0, 9), max_size=3)), max_size=3))
def test_memory_holds_the_latest_transitions(tmp_path_factory, capacity, runs):
    """Across runs that go on, each with more room or less. Where one is lost, a later one has taken its place."""
    path, count, kept = tmp_path_factory.mktemp("memory") / "replay.npy", 0, {}
    for growth, adds in runs:
        old, capacity = capacity, max(1, capacity + growth)
        kept = {i: kept[max(j for j in range(i, count, old))] for i in range(count)}
        buffer = ReplayBuffer(capacity, (2,), 3)
        if path.exists():
            buffer.load(path, count)
        buffer.create(path)
        for n in [0, *adds]:
            fill(buffer, range(count, count + n)).save(path)
            kept |= {i: i for i in range(count, count + n)}
            count += n
            expected = np.zeros((capacity, 9), np.float32)
            for i in range(max(0, count - capacity), count):
                expected[i % capacity] = np.hstack(transition(kept[i]))
            assert buffer.count == count
            assert np.array_equal(buffer.rows, np.load(path))
            assert np.array_equal(load_rows(path), expected)


def test_a_file_is_read_in_parts(tmp_path):
    """What does not fit twice can be loaded, too: a copy of 20,000 transitions would take 720,000 bytes."""
    old, new = fill(ReplayBuffer(20_000, (2,), 3), range(23_000)), ReplayBuffer(20_500, (2,), 3)
    old.create(tmp_path / "replay.npy")
    tracemalloc.start()
    new.load(tmp_path / "replay.npy", 23_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = np.arange(2_500, 23_000)
    numbers = np.where(kept < 3_000, kept + 20_000, kept)  # later ones have taken the place of the first 3,000
    assert np.array_equal(new.rows["reward"][kept % 20_500], 10 * numbers.astype(np.float32))
    assert peak < 500_000


def test_minibatches_are_uniform_and_copies():
    buffer, rng = fill(ReplayBuffer(5, (2,), 3), range(7)), np.random.default_rng(0)
    batch = buffer.sample(10_000, rng)
    assert [tuple(part.shape[1:]) for part in batch] == [(2,), (3,), (), (2,), ()]
    before, numbers = [part.clone() for part in batch], (batch[2] / 10).round().int().tolist()
    for part, expected in zip(batch, zip(*map(transition, numbers), strict=True), strict=True):
        assert torch.equal(part, torch.tensor(np.array(expected), dtype=torch.float32))
    np.testing.assert_allclose(np.bincount(numbers) / 10_000, [0, 0, *[0.2] * 5], atol=4 * (0.16 / 10_000) ** 0.5)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.04
    assert set((fill(ReplayBuffer(5, (2,), 3), range(1, 4)).sample(99, rng)[2] / 10).int().tolist()) == {1, 2, 3}
    fill(buffer, range(7, 12))
    assert all(map(torch.equal, batch, before))


def test_file_that_does_not_fit_or_is_damaged_is_refused(tmp_path):
    path = tmp_path / "replay.npy"
    fill(ReplayBuffer(5, (2,), 3), range(7)).create(path)
    for size, actions in (3, 3), (2, 2):
        with pytest.raises(ValueError, match="has rows of"):
            ReplayBuffer(5, (size,), actions).load(path, 7)
    for damaged in path.read_bytes()[:-1], b"no array" * 99:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"mmap|pickle"):
            ReplayBuffer(5, (2,), 3).load(path, 7)


def test_memory_that_does_not_fit_is_refused(monkeypatch, command, capfd, tmp_path):
    """With 36 bytes a transition on Pendulum-v1, for no more transitions than the run has steps."""
    room = {"memory": 36_000, "disk": 36_000}
    monkeypatch.setattr(ddpg.psutil, "virtual_memory", lambda: SimpleNamespace(available=room["memory"]))
    monkeypatch.setattr(ddpg.shutil, "disk_usage", lambda path: SimpleNamespace(free=(path == tmp_path) * room["disk"]))
    args = Args(total_timesteps=1000, log_dir=str(tmp_path / "new" / "runs"))
    assert ddpg.check_space(args, 36) == 1000
    assert ddpg.check_space(replace(args, log_dir="/", resume=str(tmp_path), buffer_size=700), 50) == 700
    for name in room:
        monkeypatch.setitem(room, name, 35_999)
        assert command(ddpg, "--total-timesteps", 1000, "--log-dir", args.log_dir) == 2
        error = capfd.readouterr().err
        assert re.fullmatch("error: a replay memory of 1,000 needs .*: give --buffer-size 999 at most\n", error)
        assert not list(tmp_path.iterdir())
        monkeypatch.setitem(room, name, 36_000)
