"""Workers of a script by way of the parameter server of cluster_a3c.py, which is an object of this process here."""

import pickle
import queue
import runpy
import shlex
import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SHORT, each_script, load
from threadpoolctl import threadpool_limits

pytest.importorskip("ray")
pytest.importorskip("scipy")
import cluster_a3c
from ray.exceptions import ActorDiedError, ActorUnavailableError

import a3c
import async_qlearning
from common.run import seed_everything


class Method:
    """A method as Ray calls it: what goes in and out is copied."""

    def __init__(self, method):
        self.method, self.calls, self.answers = method, [], []

    def remote(self, *args):
        self.calls.append(args)
        self.answers.append(pickle.loads(pickle.dumps(self.method(*pickle.loads(pickle.dumps(args))))))
        return self.answers[-1]


class LocalServer(cluster_a3c.Server):
    def __init__(self, script, args):
        super().__init__(script.SCRIPT, args, {"theta": first_theta(script, args).numpy()}, step=0)
        self.join, self.exchange = Method(self.join), Method(self.exchange)


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(cluster_a3c, "ray", SimpleNamespace(get=lambda answer: answer))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)  # `work` puts another one in place


@pytest.fixture
def full_cluster(no_ray, monkeypatch, tmp_path):
    """What `main` needs of Ray: it finds room for the first worker alone, which plays while `main` waits."""

    def start_server(*args):
        server = cluster_a3c.Server(*args)
        return SimpleNamespace(**{name: Method(getattr(server, name)) for name in ("join", "exchange", "report")})

    def remote(function):
        call = start_server if function is cluster_a3c.Server else partial(partial, function)
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=call))

    def wait(tasks, **_):
        ended = [task for task in tasks if task.args[1] == 0]
        return [ended, *(task() for task in ended)]

    fake = cluster_a3c.ray
    fake.remote, fake.wait, fake.nodes = remote, wait, lambda: [{"Alive": True, "Resources": {"CPU": 1}}]
    fake.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "0" * 56)
    monkeypatch.setattr(cluster_a3c.tools, "start_ray", lambda address: None)
    monkeypatch.setattr(cluster_a3c, "PATIENCE_SECONDS", 0.2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


def run_on_cluster(script, **arguments) -> int:
    options = {"num_workers": 2, "total_timesteps": 100, "eval_episodes": 1, "log_dir": "my runs"} | arguments
    return cluster_a3c.main(script, cluster_a3c.args_class(script.SCRIPT)(**options))


def new_args(script, **arguments):
    return script.Args(**(SHORT[script] | {"env_id": "CartPole-v1", "total_timesteps": 300} | arguments))


def first_theta(script, args) -> torch.Tensor:
    threadpool_limits(1)  # as in main; with two threads the first weights differ in their last digits
    seed_everything(args.seed, 0)
    return cluster_a3c.new_model(script, script.make_env(args.env_id)).theta


def learn(script, args) -> LocalServer:
    """Everything that one worker does, by way of a server."""
    server = LocalServer(script, args)
    shared = cluster_a3c.RemoteShared(server, 0, lag=0)
    script.worker(0, args, shared, 0)
    return server


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("script", "arguments"),
    [(a3c, {}), (async_qlearning, {}), (async_qlearning, {"target": "sarsa", "n_step": 3})],
)
def test_a_worker_learns_the_same_by_way_of_the_server(script, arguments):
    """What differs for a worker is when it gets T and theta-: here with the answer to a segment."""
    if script is async_qlearning:
        arguments |= {"exploration_fraction": 0.0, "final_epsilons": (0.3,) * 3, "target_network_frequency": 500}
    args = new_args(script, anneal_lr=False, **arguments)
    server = learn(script, args)
    T, episodes, begun, means, state = server.report(stop=False, with_state=True)
    assert args.total_timesteps < T <= args.total_timesteps + 5
    shared = script.Shared(first_theta(script, args), args, queue.SimpleQueue)
    args.total_timesteps = T - 1  # the script ends with the same step
    script.worker(0, args, shared, 0)
    assert T == shared.T
    assert set(state) == {name for name in cluster_a3c.STATE if hasattr(shared, name)}
    for name, array in state.items():
        assert torch.equal(torch.tensor(array), getattr(shared, name)), name
    assert begun == [1]
    rows, own = [
        [(step, worker, score["r"], score["l"]) for step, worker, score, _ in reports]
        for reports in (episodes, shared.reported())
    ]
    assert rows == own
    assert len(rows) > 5
    assert means == shared.means()


@pytest.mark.usefixtures("no_ray")
def test_theta_minus_is_sent_only_when_it_has_changed():
    args = new_args(async_qlearning, target_network_frequency=100)
    server = learn(async_qlearning, args)
    answers = [*server.join.answers, *server.exchange.answers]
    changed = [index for index, (*_, theta_target) in enumerate(answers) if theta_target is not None]
    assert [answers[index][0] // 100 for index in changed] == [0, 1, 2, 3][: len(changed)]
    assert len(changed) >= 3
    for index in changed[1:]:  # it is theta as it was before this segment
        assert torch.equal(torch.tensor(answers[index][-1]), torch.tensor(answers[index - 1][2]))


def send(shared: cluster_a3c.RemoteShared, steps: int = 3) -> None:
    """One segment, of a gradient of ones."""
    for _ in range(steps):
        shared.count_step(0, None)
    shared.update(torch.ones_like(shared.theta), 0.1)
    shared.log(0, dict.fromkeys(a3c.METRICS, 0.0))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_theta_and_T_are_so_many_segments_old(lag):
    server = LocalServer(a3c, new_args(a3c))
    shared = cluster_a3c.RemoteShared(server, 0, lag)
    thetas = [server.shared.theta.clone()]
    for segment in range(1, 6):
        send(shared)
        thetas.append(server.shared.theta.clone())
        assert not torch.equal(thetas[-1], thetas[-2])
        assert torch.equal(shared.theta, thetas[max(0, segment - lag)])
        assert (shared.T, server.shared.T) == (3 * max(0, segment - lag), 3 * segment)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("arrives", [False, True])
def test_an_answer_that_is_lost_is_asked_for_again(monkeypatch, lag, arrives):
    """Whether the server has learned from the segment or not: it does so once, or with a lag perhaps not at all."""

    def get(answer):
        if answer is lost:
            raise ActorUnavailableError("for a while", None)
        return answer

    lost = object()
    monkeypatch.setattr(cluster_a3c, "ray", SimpleNamespace(get=get))
    monkeypatch.setattr(cluster_a3c.time, "sleep", lambda seconds: None)
    server = LocalServer(a3c, new_args(a3c))
    exchange = server.exchange
    shared = cluster_a3c.RemoteShared(server, 0, lag)
    for segment in range(4):
        server.exchange = exchange if segment != 1 else SimpleNamespace(remote=lambda *call: lose(call))

        def lose(call):
            server.exchange = exchange  # the next call is heard
            if arrives:
                exchange.remote(*call)
            return lost

        send(shared)
    assert server.shared.T == 3 * (4 if arrives or not lag else 3)
    assert torch.equal(shared.theta, torch.tensor(exchange.answers[-1 - lag][2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "--learning-rate must be above 0 and finite, not -1"),
        ({"evaluate": "runs/x"}, "evaluate with: python a3c.py --evaluate runs/x"),
        ({"backend": "thread"}, "--backend is for a3c.py: here, workers are tasks of Ray"),
        ({"resume": "runs/x"}, "'runs/x' holds no checkpoint.pt of a3c.py, or a damaged one"),
        ({"env_id": "NoSuch-v0"}, "NoSuch-v0 cannot be used"),
        ({"address": "ray://head:10001"}, "--address ray://head:10001: start the program on a machine of the cluster"),
    ],
)
def test_bad_input_of_a_cluster_run(capsys, tmp_path, arguments, message):
    args = cluster_a3c.args_class("a3c")(log_dir=str(tmp_path / "runs"), **arguments)
    with pytest.raises(SystemExit) as end:
        cluster_a3c.main(a3c, args)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_backend_of_the_run_that_goes_on_is_no_flag(capsys, tmp_path):
    stored = {"env_id": "NoSuch-v0", "backend": "process"}
    torch.save({"script": "a3c", "args": stored}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit):
        cluster_a3c.main(a3c, cluster_a3c.args_class("a3c")(resume=str(tmp_path), **stored))
    assert "NoSuch-v0 cannot be used" in capsys.readouterr().err


@pytest.mark.usefixtures("no_ray")
def test_segments_are_counted_anew_when_a_worker_begins_again():
    server = LocalServer(a3c, new_args(a3c))
    for begun in (1, 2):
        shared = cluster_a3c.RemoteShared(server, 0, lag=0)
        assert shared.begun == begun
        for _ in range(3 - begun):
            send(shared)
        server.exchange.remote(*server.exchange.calls[-1])  # once more, as after an answer that was lost
    assert server.shared.T == 3 * (2 + 1)


@pytest.mark.usefixtures("no_ray")
def test_each_worker_is_told_which_it_is(monkeypatch):
    seen = []
    shared = SimpleNamespace(T=7, stop=SimpleNamespace(value=False), under_way=[])
    monkeypatch.setattr(cluster_a3c, "RemoteShared", lambda *_: shared)
    monkeypatch.setattr(async_qlearning, "worker", lambda *call: seen.append((call[0], call[-1])))
    for index in range(3):
        cluster_a3c.work("async_qlearning", index, cluster_a3c.args_class("async_qlearning")(), None)
    assert seen == [(0, 7), (1, 7), (2, 7)]


@pytest.mark.usefixtures("no_ray")
def test_a_worker_that_exits_is_not_started_again(monkeypatch):
    shared = SimpleNamespace(T=7, stop=SimpleNamespace(value=False), under_way=[])
    monkeypatch.setattr(cluster_a3c, "RemoteShared", lambda *_: shared)
    monkeypatch.setattr(a3c, "worker", lambda *_: sys.exit(0))
    with pytest.raises(RuntimeError, match="worker 1 has exited with code 0"):
        cluster_a3c.work("a3c", 1, cluster_a3c.args_class("a3c")(), None)


def test_the_server_takes_subnormal_numbers_for_0():
    server = LocalServer(a3c, new_args(a3c))
    assert server.shared.g.fill_(1.18e-38).mul_(0.99).max() == 0


@pytest.mark.usefixtures("full_cluster")
def test_a_run_ends_without_the_workers_that_have_found_no_room(capsys):
    assert run_on_cluster(async_qlearning) == 0
    output = capsys.readouterr().out
    assert "room for 1 of 2 workers (the first explore least); the others wait\nA smaller --cpus-per-worker" in output


def test_a_run_can_be_stopped_before_a_worker_has_found_room(full_cluster, tmp_path):
    def interrupt(tasks, **_):
        full_cluster.wait = lambda tasks, **_: ([], tasks)
        signal.raise_signal(signal.SIGINT)
        return [], tasks

    full_cluster.wait = interrupt
    assert run_on_cluster(a3c) == 130
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert load(checkpoint.parent)["step"] == 0


@pytest.mark.usefixtures("full_cluster")
def test_the_server_is_lost_with_the_last_call(monkeypatch, tmp_path, capsys):
    def report(server, stop: bool, with_state: bool) -> tuple:
        if server.shared.T > 200:
            raise ActorDiedError
        return first_report(server, stop, with_state)

    first_report = cluster_a3c.Server.report
    monkeypatch.setattr(cluster_a3c.Server, "report", report)
    assert run_on_cluster(a3c, total_timesteps=200) == 1
    cause = f"a3c: the parameter server is lost: {ActorDiedError()}\n"
    assert f"{cause}There is no checkpoint yet.\n" in capsys.readouterr().err
    assert run_on_cluster(a3c) == 0
    (folder,) = [path.parent for path in tmp_path.rglob("checkpoint.pt")]
    assert run_on_cluster(a3c, resume=str(folder.relative_to(tmp_path)), total_timesteps=200) == 1
    *_, resume, _ = capsys.readouterr().err.splitlines()
    flags = ["--script", "a3c.py", "--resume", str(folder), "--address", "local"]
    assert shlex.split(resume) == [sys.executable, cluster_a3c.__file__, *flags]


@each_script(a3c, async_qlearning)
def test_a_checkpoint_that_lacks_something_is_refused(capsys, tmp_path, script):
    args = new_args(script)
    model = cluster_a3c.new_model(script, script.make_env(args.env_id))
    state = {"script": script.SCRIPT, "args": vars(args), "step": 10, "model": model.state_dict()}
    state |= {"g": torch.zeros_like(model.theta)} if script is async_qlearning else {}  # that needs theta_target, too
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit):
        run_on_cluster(script, resume=str(tmp_path))
    assert "the checkpoint does not fit CartPole-v1" in capsys.readouterr().err


def test_the_script_is_the_one_that_is_named(monkeypatch, capsys):
    arguments = ["cluster_a3c.py", "--script", "async_qlearning.py", "--backend", "thread"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(cluster_a3c.__file__, run_name="__main__")
    assert end.value.code == 2
    assert "--backend is for async_qlearning.py" in capsys.readouterr().err
