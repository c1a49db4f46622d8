"""Two processes under torchrun learn what one learns with twice the accumulation, on one node and on two."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from support.tiny_training import Inputs, Run, equal, make_inputs, pictures

from sd3pipe.training.processes import Processes

RUN = """
import sys
from sd3pipe.commands.train import main
from sd3pipe.errors import Sd3pipeError
from sd3pipe.params.train import TrainParams
try:
    main(TrainParams.model_validate_json(sys.argv[1]))
except Sd3pipeError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
# gradients are summed in another order: rounding of float32 over five steps of plain descent. Adam would divide each
# gradient by its own size, so that one of pure rounding moves its weight as far as any other.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    dataset = [*pictures(7), *pictures(3, subset="held out", split="validation")]
    return make_inputs(tmp_path_factory.mktemp("processes"), dataset, train_batch_size=2, network_dropout=0.1)


def torchrun(nodes: int, per_node: int, port: int) -> list[list[str]]:
    return [
        [
            "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={per_node}",
            "--master-addr=127.0.0.1", f"--master-port={port}",
        ]
        for node in range(nodes)
    ]  # fmt: skip


def accelerate_launch(nodes: int, per_node: int, port: int) -> list[list[str]]:
    """As on cards: with --cpu accelerate would start one process alone."""
    words = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={per_node}", "--num_machines=1"]
    return [[*words, "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]]


def launch(inputs: Inputs, out: str, launcher, *, nodes: int, per_node: int, script: str = RUN, **options):
    """Trains in `nodes` x `per_node` processes on this machine; returns the run, the exit codes and what was said."""
    program = inputs.folder / f"{out}.py"
    program.write_text(script)
    params = inputs.params(out, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *words, str(program), params.model_dump_json()],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for words in launcher(nodes, per_node, port)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return Run(params.out), [process.returncode for process in started], "\n".join(outputs)


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / (second[name].norm() + 1e-12)) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "nodes", "per_node"),
    [(torchrun, 1, 2), (torchrun, 2, 1), (accelerate_launch, 1, 2)],
    ids=["torchrun", "torchrun on two nodes", "accelerate launch"],
)
def test_two_processes_equal_one_with_twice_the_accumulation(inputs, launcher, nodes, per_node):
    options = {
        "max_train_steps": 5, "save_every_n_steps": 5, "validate_every_n_steps": 5, "log_with": "tensorboard",
        "output_name": "together", "optimizer_type": "SGD", "learning_rate": 0.1, "max_grad_norm": 0.0,
    }  # fmt: skip
    alone = inputs.train("alone", gradient_accumulation_steps=4, resume="never", **options)
    name = f"{launcher.__name__}-{nodes}"
    together, codes, said = launch(
        inputs, name, launcher, nodes=nodes, per_node=per_node, gradient_accumulation_steps=2, **options
    )
    assert set(codes) == {0}, said
    assert len(list((together.folder / "logs" / "together").glob("events*"))) == 1  # the main process alone logs
    assert relative_difference(together.adapter(), alone.adapter()) < TOLERANCE
    assert together.losses() == pytest.approx(alone.losses(), rel=TOLERANCE)
    seen = [[sorted(sample[:2] for sample in step) for step in run.samples()] for run in (together, alone)]
    assert seen[0] == seen[1]
    validation = [run.records("validation")[-1] for run in (alone, together)]
    assert validation[1]["by_picture"] == pytest.approx(validation[0]["by_picture"], rel=TOLERANCE)
    assert together.state(5)["identity"] == alone.state(5)["identity"]
    assert together.steps() == [5]


POISONED = RUN.replace(
    "try:",
    """import math
from sd3pipe.training.objective import Objective
losses = Objective.losses
def poisoned(self, forward_pass, velocity):
    found = losses(self, forward_pass, velocity)
    plan = forward_pass.batch.plan
    return found * math.nan if (plan.epoch, plan.index) == (0, 1) else found
Objective.losses = poisoned
try:""",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",
    [
        {"blocks_to_swap": 2},
        {"blocks_to_swap": 1, "layer_major": True, "activation_offload": True, "modulation": "ahead"},
        {"blocks_to_swap": 2, "base_dtype": "int8"},
    ],
    ids=["streamed", "layer-major", "int8"],
)
def test_two_processes_that_stream_equal_two_that_do_not(inputs, memory):
    """And Adam's steps too: both sum the same gradients in the same order."""
    options = {"max_train_steps": 4, "save_every_n_steps": None, "gradient_accumulation_steps": 2, "resume": "never"}
    options |= {"base_dtype": memory.get("base_dtype"), "output_name": "streaming"}
    runs = []
    for name, changed in (("resident", {"blocks_to_swap": 0}), ("streaming", memory)):
        run, codes, said = launch(inputs, name, torchrun, nodes=1, per_node=2, **options | changed)
        assert set(codes) == {0}, said
        runs.append(run)
    resident, streaming = runs
    assert equal(streaming.adapter(), resident.adapter())
    assert streaming.losses() == resident.losses()
    assert streaming.report()["streamed_bytes"] > 0 and resident.report()["streamed_bytes"] == 0


@pytest.mark.slow
def test_a_bad_loss_names_the_pictures_of_all_processes(inputs):
    options = {"on_bad_loss": "rollback", "max_train_steps": 3, "train_batch_size": 1}
    run, codes, said = launch(inputs, "poisoned", torchrun, nodes=1, per_node=2, script=POISONED, **options)
    assert codes == [1], said  # torchrun's own, whatever its processes ended with
    assert "Nothing was learnt from it" in said  # there is no checkpoint to go back to before the first step
    (event,) = run.records("event")
    assert len(event["pictures"]) == 2


@pytest.mark.slow
def test_a_time_limit_stops_all_processes(inputs):
    options = {"time_limit": "0", "max_train_steps": 50, "gradient_accumulation_steps": 2}
    run, _, said = launch(inputs, "limited", torchrun, nodes=1, per_node=2, **options)
    assert said.count("stopped by time limit at step 1") == 2, said
    assert run.steps() == [1]


def test_gradients_are_averaged_over_processes(monkeypatch):
    """The sum over two processes with equal gradients is twice one of them."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))
    weights = [
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.nn.Parameter(torch.zeros(4)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    weights[0].grad, weights[1].grad = torch.arange(6.0).view(2, 3), torch.arange(4.0)
    Processes(rank=0, count=2, device=torch.device("cpu")).mean_gradients(weights)
    assert torch.equal(weights[0].grad, torch.arange(6.0).view(2, 3))
    assert torch.equal(weights[1].grad, torch.arange(4.0))
    assert weights[2].grad is None


def test_a_launcher_whose_processes_do_not_find_each_other_is_refused(inputs, monkeypatch):
    from sd3pipe.errors import ParameterError
    from sd3pipe.training import processes

    class Alone:
        num_processes = 1

        def __init__(self, **options: object) -> None:
            pass

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", Alone)
    with pytest.raises(ParameterError, match="started 2 processes, but 1 found"):
        processes.join_processes("cpu", 1)
