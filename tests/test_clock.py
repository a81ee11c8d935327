"""When the clock of a run starts."""

import threading

from conftest import WITH_WORKERS, each_script, wait_until

import ddpg
import gae


@each_script(*WITH_WORKERS)
def test_time_begins_with_the_first_step(train, monkeypatch, script):
    begun, start = [], script.Run.start

    def late(index, args, shared, first_step):
        wait_until(lambda: len(begun) > 3, seconds=10)  # the main process has looked a few times and seen no step
        shared.count_step(index)
        shared.done[index] = True

    _, folder = train(script, total_timesteps=10)
    monkeypatch.setattr(script, "worker", late)
    monkeypatch.setattr(script.Run, "start", lambda run: begun.append(run) or start(run))
    assert train(script, total_timesteps=10)[0] == 0
    begun.clear()
    assert train(script, total_timesteps=50, resume=str(folder))[0] == 0


@each_script(*WITH_WORKERS)
def test_time_begins_when_all_workers_have_been_started(train, monkeypatch, script):
    """Also if one has stepped before that."""
    events, start, start_thread = [], script.Run.start, threading.Thread.start

    def start_worker(thread):
        shared = thread._args[2] if "(worker)" in thread.name else None
        start_thread(thread)
        if shared is not None:
            wait_until(lambda: shared.T > 0)
            events.append("worker")

    monkeypatch.setattr(threading.Thread, "start", start_worker)
    monkeypatch.setattr(script.Run, "start", lambda run: events.append("clock") or start(run))
    assert train(script, num_workers=2, backend="thread", total_timesteps=10_000)[0] == 0
    assert events == ["clock", "worker", "worker", "clock"]


@each_script(gae, ddpg)
def test_time_begins_when_the_environments_are_made(train, monkeypatch, script):
    events, make_env, start = [], script.make_env, script.Run.start
    monkeypatch.setattr(script, "make_env", lambda *args, **more: events.append("make") or make_env(*args, **more))
    monkeypatch.setattr(script.Run, "start", lambda run: events.append("start") or start(run))
    train(script, total_timesteps=10)
    assert events[-2:] == ["make", "start"]
