"""What the disk holds after kill -9 and when it is full, and how a run goes on from there."""

import json
import resource

import pandas as pd
import psutil
import pytest
import torch
from conftest import WITH_WORKERS, each_script, load, tables

import ddpg

pytestmark = pytest.mark.usefixtures("nothing_is_left_running")

# kill -9. A worker reports an episode before it counts the last step; the main process reads T, then the reports


@each_script(*WITH_WORKERS)
def test_no_worker_outlives_a_killed_run(start, script):
    """Not even one that hangs."""
    child = start(script, "--env-id", "faulty:Hangs-v0", "--num-workers", 2, "--backend", "process")
    child.wait_for("episodes.csv", lines=10)
    children = psutil.Process(child.process.pid).children(recursive=True)
    assert len(children) >= 4
    child.process.kill()
    assert not psutil.wait_procs(children, timeout=20)[1]


@each_script()
def test_kill_9_then_resume(start, command, script):
    """The n-th episode of the one environment has the return n, so every row is known."""
    child = start(script, "--env-id", "probes:Counts-v0", "--total-timesteps", 10**9, "--gamma", 0.5)
    child.wait_for("checkpoint.pt")
    folder = child.wait_for("episodes.csv", lines=40)
    child.process.kill()
    child.process.wait()
    tables(folder)
    before = load(folder)
    target, number = before["step"] + 300, before["step"] // 3
    with open(folder / "episodes.csv", "a") as table:  # as if killed within a row
        table.write(f"{before['step'] + 1},1.0,0,9,9\n{before['step']},1.")

    assert command(script, "--resume", folder, "--total-timesteps", target, "--eval-episodes", 1) == 0
    after = load(folder)
    assert target <= after["step"] <= target + 10
    args = json.loads((folder / "args.json").read_text())
    assert (args["gamma"], args["env_id"]) == (0.5, "probes:Counts-v0")  # the run's, not the default
    episodes, metrics = pd.read_csv(folder / "episodes.csv"), pd.read_csv(folder / "metrics.csv")
    is_old = episodes["step"] <= before["step"]
    for rows, offset, count in ((episodes[is_old], 0, number), (episodes[~is_old], before["step"], None)):
        known = [[offset + 3 * i, i, 3] for i in range(1, len(rows) + 1)]
        assert rows[["step", "return", "length"]].to_numpy().tolist() == known  # none is missing in between or doubled
        assert len(rows) == (count or (after["step"] - offset) // 3)
    assert (episodes["time"][~is_old] >= before["seconds"]).all()
    assert after["seconds"] >= metrics["time"].max() > before["seconds"]
    assert metrics["step"].is_monotonic_increasing
    assert before["step"] < metrics["step"].max() <= after["step"]
    assert list(folder.parent.iterdir()) == [folder]


@each_script(*WITH_WORKERS)
def test_an_episode_is_reported_before_its_last_step_is_counted(script):
    class Queue(list):
        def put(self, report):
            self.append((report[0], shared.T))

    shared = script.Shared(torch.ones(1), script.Args(num_workers=1), Queue)
    shared.count_step(0)
    shared.count_step(0, {"r": 1.0, "l": 2})
    assert shared.episodes == [[(2, 1)]]


@each_script(*WITH_WORKERS)
def test_metrics_are_read_whole(script):
    """Also by a main process that looks while a worker logs."""

    class Metrics(dict):
        def __getitem__(self, name):
            read.append(shared.means())
            return super().__getitem__(name)

    shared, read = script.Shared(torch.ones(1), script.Args(num_workers=1), list), []
    shared.log(0, Metrics.fromkeys(script.METRICS, 3.0))
    assert [means for means in [*read, shared.means()] if means] == [dict.fromkeys(script.METRICS, 3.0)]


@each_script(*WITH_WORKERS)
def test_no_checkpoint_counts_an_episode_that_is_not_in_the_table(train, monkeypatch, script):
    """Not even one that ends while the main process writes."""
    reported = script.Shared.reported

    def one_ends_afterwards(shared):
        yield from reported(shared)
        shared.count_step(0, {"r": 1.0, "l": 1})

    monkeypatch.setattr(script.Shared, "reported", one_ends_afterwards)
    monkeypatch.setattr(script, "worker", lambda index, args, shared, first_step: shared.done.__setitem__(index, True))
    _, folder = train(script)
    assert load(folder)["step"] == len(tables(folder)[0]) > 0


# Full disks. A limit on the size of files makes write() return short, too


@pytest.fixture
def limit_file_size():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@each_script()
def test_a_full_disk_tears_no_row(train, capfd, limit_file_size, script):
    _, folder = train(script, env_id="probes:Counts-v0", total_timesteps=60)
    before, table = load(folder), folder / "episodes.csv"
    size = max(path.stat().st_size for path in folder.iterdir()) + 10_000
    with open(table, "ab") as file:  # long enough to be the first file that is too large
        row = f"{before['step']},{before['seconds']},0,9,9\n".encode()
        file.write(row * ((size - table.stat().st_size) // len(row)))
    limit_file_size(table.stat().st_size + 5)
    content = table.read_bytes()

    arguments = {"env_id": "probes:Counts-v0", "total_timesteps": 10**9, "resume": str(folder)}
    assert train(script, **arguments, eval_episodes=1)[0] == 1
    assert "no space left" in capfd.readouterr().err
    assert table.read_bytes() == content
    assert load(folder)["model"].keys() == before["model"].keys()


@each_script()
def test_a_full_disk_spares_the_checkpoint(train, capfd, limit_file_size, script):
    _, folder = train(script, total_timesteps=60)
    content = (folder / "checkpoint.pt").read_bytes()
    limit_file_size(len(content) // 2)
    assert train(script, total_timesteps=10**9, resume=str(folder), eval_episodes=1)[0] == 1
    assert "Traceback" in capfd.readouterr().err
    assert (folder / "checkpoint.pt").read_bytes() == content


def test_in_its_own_folder_ddpg_goes_on_with_its_optimisers(train, command, monkeypatch):
    _, folder = train(ddpg, total_timesteps=40)
    monkeypatch.chdir(folder)
    assert command(ddpg, "--resume", "", "--total-timesteps", 60, "--eval-episodes", 0) == 0
    assert load(folder)["adam"]["critic"]["state"][0]["step"] == 41  # 21 + 20


@each_script()
def test_in_its_own_folder_a_run_is_evaluated(train, command, monkeypatch, script):
    _, folder = train(script, total_timesteps=40)
    monkeypatch.chdir(folder)
    before = (folder / "checkpoint.pt").read_bytes()
    assert command(script, "--evaluate", "", "--eval-episodes", 1) == 0
    assert (folder / "evaluation.json").exists()
    assert (folder / "checkpoint.pt").read_bytes() == before
