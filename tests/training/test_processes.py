"""Two processes under torchrun learn what one learns with twice the accumulation, on one node and on two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import Inputs, Run, make_inputs, pictures

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
# gradients are summed in another order: rounding of float32 over five steps
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    dataset = [*pictures(7), *pictures(3, subset="held out", split="validation")]
    return make_inputs(tmp_path_factory.mktemp("processes"), dataset, train_batch_size=2, network_dropout=0.1)


def torchrun(inputs: Inputs, out: str, *, nodes: int, per_node: int, **options) -> Run:
    """Trains in `nodes` x `per_node` processes on this machine."""
    script = inputs.folder / "run.py"
    script.write_text(RUN)
    params = inputs.params(out, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [
        [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={node}",
            f"--nproc-per-node={per_node}", "--master-addr=127.0.0.1", f"--master-port={port}",
            str(script), params.model_dump_json(),
        ]
        for node in range(nodes)
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    return Run(params.out)


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / (second[name].norm() + 1e-12)) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (2, 1)], ids=["one node", "two nodes"])
def test_two_processes_equal_one_with_twice_the_accumulation(inputs, nodes, per_node):
    options = {"max_train_steps": 5, "save_every_n_steps": 5, "validate_every_n_steps": 5}
    alone = inputs.train("alone", gradient_accumulation_steps=4, resume="never", **options)
    together = torchrun(
        inputs, f"together-{nodes}", nodes=nodes, per_node=per_node, gradient_accumulation_steps=2, **options
    )
    assert relative_difference(together.adapter(), alone.adapter()) < TOLERANCE
    assert together.losses() == pytest.approx(alone.losses(), rel=TOLERANCE)
    validation = [run.records("validation")[-1] for run in (alone, together)]
    assert validation[1]["by_picture"] == pytest.approx(validation[0]["by_picture"], rel=TOLERANCE)
    assert together.state(5)["identity"] == alone.state(5)["identity"]
    assert together.steps() == [5]


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


def test_the_script_of_these_tests_is_what_a_user_starts():
    """`sd3pipe` is a module, so torchrun -m sd3pipe train works as well."""
    assert (Path(__file__).parents[2] / "sd3pipe" / "__main__.py").is_file()
