"""What every script promises of a run that goes well: what is written, logged, evaluated, repeated and resumed."""

import importlib.util
import json
import math
import re
import shutil
import sys
import threading
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pandas as pd
import probes
import pytest
import torch
from conftest import SHORT, WITH_WORKERS, as_options, each_script, load, tables
from torch.utils._pytree import tree_leaves

import a3c
import async_qlearning
import ddpg
import gae

OPTIONS = [
    (a3c, {"backend": "process", "num_workers": 2}),
    (a3c, {"anneal_lr": False, "t_max": 1, "gamma": 1.0}),
    (async_qlearning, {"backend": "process", "num_workers": 2, "n_step": 3}),
    (async_qlearning, {"target": "sarsa", "target_network_frequency": 1, "anneal_lr": False}),
    (async_qlearning, {"final_epsilons": (0.5,), "final_epsilon_probs": (1.0,), "exploration_fraction": 0.0}),
    (gae, {"num_envs": 3, "batch_size": 50}),
    (gae, {"trust_region": False, "norm_obs": True, "norm_returns": False}),
    (ddpg, {"batch_norm": True, "target_network": False}),
    (ddpg, {"noise": "ou", "final_noise_std": 0.0, "learning_starts": 0, "buffer_size": 50}),
]
ENVIRONMENTS = ["Acrobot-v1", "FrozenLake-v1", "Blackjack-v1", "probes:DictObservation-v0", "Pendulum-v1"]
SMOKE = [(script, {}, env_id) for script in SHORT for env_id in ENVIRONMENTS]
SMOKE += [(script, options, "probes:DictObservation-v0") for script, options in OPTIONS]


# Smoke


@pytest.mark.parametrize(("script", "options", "env_id"), SMOKE, ids=lambda x: getattr(x, "SCRIPT", None) or str(x))
def test_smoke(train, script, options, env_id):
    if script is async_qlearning and env_id == "Pendulum-v1":
        env_id = "CartPole-v1"
    code, folder = train(script, env_id=env_id, total_timesteps=130, log_interval=50, eval_episodes=1, **options)
    assert code == 0
    checkpoint, result = load(folder), json.loads((folder / "evaluation.json").read_text())
    assert 130 <= checkpoint["step"] <= 140
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert result["episodes"] == 1
    assert math.isfinite(result["mean_return"])
    assert len(tables(folder)[1]) >= 1


@each_script(*WITH_WORKERS)
def test_smoke_spawned_processes(train, monkeypatch, script):
    """As on macOS and Windows."""
    monkeypatch.setattr(script, "START_METHOD", "spawn")
    code, folder = train(script, backend="process", total_timesteps=50)
    assert code == 0
    assert load(folder)["step"] > 50


# What is written


@each_script()
def test_the_run_folder_holds_what_the_readme_lists(train, script):
    code, folder = train(script, env_id="probes:Counts-v0", total_timesteps=300, log_interval=50, eval_episodes=2)
    assert code == 0
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents.")}
    expected = {"args.json", "episodes.csv", "metrics.csv", "checkpoint.pt", "evaluation.json"}
    assert names == expected | ({"replay.npy"} if script is ddpg else set())
    assert folder.name.startswith(f"probes-Counts-v0__{script.SCRIPT}__1__")

    args = json.loads((folder / "args.json").read_text())
    assert vars(script.Args(**load(folder)["args"])).keys() <= args.keys()
    assert {"versions", "cores", "gil"} <= args.keys()
    assert (args["env_id"], args["total_timesteps"], args["log_interval"]) == ("probes:Counts-v0", 300, 50)

    assert json.loads((folder / "evaluation.json").read_text())["returns"] == [1, 2]  # of a fresh environment
    episodes, metrics = tables(folder)
    step = load(folder)["step"]
    known = [(3 * i, 0, i, 3) for i in range(1, step // 3 + 1)]
    assert episodes[["step", "worker", "return", "length"]].to_numpy().tolist() == [list(row) for row in known]
    assert list(metrics) == ["step", "time", *script.METRICS, "steps_per_second"]
    assert not metrics.isna().any(axis=None)
    assert 300 <= metrics["step"].iloc[-1] <= step  # in async_qlearning.py, the last step may end no segment
    assert (metrics["steps_per_second"] > 0).all()
    if script not in WITH_WORKERS:  # these are looked at only now and then
        assert metrics["step"].tolist() == [50, 100, 150, 200, 250, 300]


@each_script()
def test_the_checkpoint_holds_no_random_state(train, script):
    _, folder = train(script, total_timesteps=20)
    checkpoint = load(folder)
    assert checkpoint.keys() >= {"script", "args", "step", "seconds", "model"}
    assert checkpoint["script"] == script.SCRIPT
    assert not [name for name in checkpoint if "random" in name or "rng" in name]
    assert torch.uint8 not in {getattr(part, "dtype", None) for part in tree_leaves(checkpoint)}  # as torch's state


@each_script()
def test_tensorboard_gets_what_the_tables_get(train, script):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, folder = train(script, env_id="probes:Counts-v0", total_timesteps=300, log_interval=50, eval_episodes=1)
    (first,) = folder.glob("events.*")  # as if of an earlier second: files are read in the order of their names
    first.rename(folder / re.sub(r"tfevents\.\d+", "tfevents.1000000000", first.name))
    torch.save(load(folder) | {"step": 200}, folder / "checkpoint.pt")  # the rows beyond are to be dropped
    train(script, env_id="probes:Counts-v0", total_timesteps=400, log_interval=50, resume=str(folder), eval_episodes=1)
    metrics = tables(folder)[1]
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert (metrics["step"].diff().dropna() > 0).all()
    columns = {f"{family}/{name}": name for name, family in script.METRICS.items()}
    for tag, column in (columns | {"charts/SPS": "steps_per_second"}).items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == metrics["step"].tolist()
        np.testing.assert_allclose([scalar.value for scalar in scalars], metrics[column], rtol=1e-5)
    tags = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/episodic_length", "eval/mean_return"} <= tags
    assert set(script.METRICS.values()) == {"charts", "losses"}


@each_script()
def test_without_tensorboard_the_tables_are_written(train, capsys, monkeypatch, script):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, folder = train(script, total_timesteps=100, log_interval=50, eval_episodes=1)
    assert code == 0
    assert "tensorboard is not installed: only the CSV files are written\n" in capsys.readouterr().out
    assert len(tables(folder)[1]) >= 1
    assert not list(folder.glob("events*"))


@each_script()
def test_the_last_line_sums_up(train, capsys, script):
    _, folder = train(script, total_timesteps=100, eval_episodes=2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{script.SCRIPT}: {load(folder)['step']} steps in ")
    assert " steps per second; greedy return " in last
    assert last.endswith(f" over 2 episodes; {folder}")


# The command line


@each_script()
def test_every_argument_has_help_and_every_number_a_range(command, capsys, script):
    assert command(script, "--help") == 0
    out = capsys.readouterr().out
    assert " ".join(script.__doc__.split()[:8]) in " ".join(out.split())
    for name, hint in get_type_hints(script.Args, include_extras=True).items():
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", out), name
        if "float" in str(hint) or "int" in str(hint):
            assert "Range(" in str(hint), name
    everywhere = {"env_id", "seed", "total_timesteps", "learning_rate", "gamma", "log_dir", "log_interval"}
    assert everywhere | {"eval_episodes", "evaluate", "resume", "capture_video"} <= script.Args.__annotations__.keys()


# Resuming, evaluating, filming

STILL = {  # arguments that leave everything learned as it is
    a3c: {"rmsprop_alpha": 1.0},
    async_qlearning: {"rmsprop_alpha": 1.0, "target_network_frequency": 10**6},
    gae: {"trust_region": False, "norm_returns": False},
    ddpg: {"actor_learning_rate": 1e-30, "tau": 1e-30},
}
UPDATES_PER_STEP = {gae: 0.5, ddpg: 1}  # of the critic


@each_script()
def test_resume_goes_on_from_the_checkpoint(train, command, script):
    _, folder = train(script, total_timesteps=200, log_interval=50, gamma=0.5, eval_episodes=1)
    before, rows = load(folder), tables(folder)[0]
    options = as_options(resume=folder, total_timesteps=400, learning_rate=1e-30, eval_episodes=0, **STILL[script])
    assert command(script, *options) == 0
    after = load(folder)
    assert after["args"]["gamma"] == 0.5
    assert 200 <= before["step"] < 400 <= after["step"]
    assert after["seconds"] > before["seconds"]
    for name in {"g", "theta_target"} & before.keys():
        assert before[name].any()
        assert torch.equal(after[name], before[name])
    for name, tensor in before["model"].items():
        assert torch.equal(after["model"][name], tensor)
    for name in {"optimizers", "adam"} & before.keys():
        updates = [each[name]["critic"]["state"][0]["step"].item() for each in (before, after)]
        assert updates[1] - updates[0] == UPDATES_PER_STEP[script] * (after["step"] - before["step"])
    episodes = tables(folder)[0]
    pd.testing.assert_frame_equal(episodes.head(len(rows)), rows)
    assert len(episodes) > len(rows)
    assert (episodes["time"][len(rows) :] >= before["seconds"]).all()
    assert not (folder / "evaluation.json").exists()  # it was of the policy before


def test_a_run_goes_on_in_the_current_folder(train, command, monkeypatch):
    _, folder = train(a3c, total_timesteps=20)
    monkeypatch.chdir(folder)
    assert command(a3c, *as_options(resume="", total_timesteps=60, eval_episodes=0)) == 0
    assert load(folder)["step"] > 60


@each_script()
def test_a_copy_under_another_name_has_runs_of_its_own(tmp_path, monkeypatch, script):
    path = shutil.copy(script.__file__, tmp_path / "my_copy.py")
    spec = importlib.util.spec_from_file_location("my_copy", path)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_copy", copy)
    spec.loader.exec_module(copy)
    arguments = SHORT[script] | {"log_dir": str(tmp_path), "eval_episodes": 0}
    assert copy.main(copy.Args(total_timesteps=20, **arguments)) == 0
    (folder,) = tmp_path.glob("*__my_copy__*")
    assert copy.main(copy.Args(total_timesteps=40, resume=str(folder), **arguments)) == 0
    assert load(folder)["step"] >= 40


@each_script()
def test_evaluate_is_greedy_repeats_and_writes_nothing_else(train, command, capsys, monkeypatch, script):
    """Where all observations are the same, so are all greedy actions."""
    _, folder = train(script, env_id="probes:TellsActions-v0", total_timesteps=100, eval_episodes=3)
    result = folder / "evaluation.json"
    expected = result.read_text()
    assert set(json.loads(expected)["returns"]) in ({0.0}, {2.0**40 - 1})
    result.unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr("multiprocessing.context.BaseContext.SimpleQueue", None)  # as many workers as one likes
    assert command(script, "--evaluate", folder, "--eval-episodes", 3) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{script.SCRIPT}: greedy return ")
    assert out.endswith(f" over 3 episodes; {folder}\n")
    assert result.read_text() == expected
    result.unlink()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@each_script()
def test_capture_video_films_three_episodes(train, command, script):
    pytest.importorskip("moviepy")
    code, folder = train(script, env_id="CartPole-v1", total_timesteps=20, eval_episodes=4, capture_video=True)
    assert code == 0
    films = list((folder / "videos").glob("*.mp4"))
    assert len(films) == 3
    assert all(film.stat().st_size > 1000 for film in films)
    shutil.rmtree(folder / "videos")
    assert command(script, "--evaluate", folder, "--eval-episodes", 1, "--capture-video") == 0
    assert len(list((folder / "videos").glob("*.mp4"))) == 1


# Workers


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize(
    ("backend", "num_workers", "gil", "used"),
    [
        ("auto", 2, True, "process"),
        ("auto", 2, False, "thread"),
        ("auto", 1, True, "thread"),
        ("thread", 2, True, "thread"),
        ("process", 1, False, "process"),
    ],
)
def test_the_backend_fits_the_interpreter(train, capsys, monkeypatch, script, backend, num_workers, gil, used):
    started, preloaded = [], []

    def new(kind, **arguments):
        started.append((kind, arguments["args"][0], arguments["args"][3]))
        return threading.Thread(**arguments)

    context = SimpleNamespace(Process=partial(new, "process"), SimpleQueue=SimpleQueue)
    context.set_forkserver_preload = preloaded.extend
    monkeypatch.setattr(script.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(script, "threading", SimpleNamespace(Thread=partial(new, "thread")))
    monkeypatch.setattr(script, "has_gil", lambda: gil)
    code, folder = train(script, backend=backend, num_workers=num_workers, total_timesteps=20)
    assert code == 0
    assert started == [(used, index, 0) for index in range(num_workers)]
    assert used == "thread" or {"gymnasium", "torch"} <= {*preloaded}
    assert json.loads((folder / "args.json").read_text())["backend_used"] == used
    assert f" {num_workers} {used} workers (GIL: {gil})" in capsys.readouterr().out


@each_script(*WITH_WORKERS)
def test_a_worker_follows_its_parent_uses_one_core_and_closes_its_environment(train, monkeypatch, script):
    events = []
    monkeypatch.setattr(script, "follow_parent", lambda: events.append("follow_parent"))
    monkeypatch.setattr(probes.Script, "close", lambda self: events.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    train(script, env_id="probes:Script-v0", total_timesteps=1)
    assert events == ["follow_parent", 1]


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize("reward", [1e30, math.inf])  # the gradient's norm becomes infinite, or not a number
def test_a_worker_leaves_theta_alone_when_the_gradient_is_not_finite(train, monkeypatch, capfd, script, reward):
    made, shared_class = [], script.Shared
    monkeypatch.setattr(script, "Shared", lambda *arguments: made.append(shared_class(*arguments)) or made[0])
    monkeypatch.setattr(probes.Endless, "play", lambda self, action: reward if self.t == 39 else 1.0)
    assert train(script, env_id="probes:Endless-v0", total_timesteps=60)[0] == 1
    assert re.search(r"FloatingPointError: .* at step 40: .*--learning-rate", capfd.readouterr().err)
    assert torch.stack([made[0].theta, made[0].g]).isfinite().all()
    assert (bool(made[0].g.any()), made[0].done[0]) == (True, 0)


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize(("backend", "num_workers"), [("thread", 16), ("process", 5)])
def test_no_step_and_no_episode_is_lost_among_many_workers(train, script, backend, num_workers):
    arguments = {"backend": backend, "num_workers": num_workers, "total_timesteps": 500, "log_interval": 200}
    _, folder = train(script, env_id="probes:Constant-v0", **arguments)
    episodes, _ = tables(folder)  # every episode has one step
    assert load(folder)["step"] == len(episodes) > 500
    assert episodes["worker"].nunique() > 1
