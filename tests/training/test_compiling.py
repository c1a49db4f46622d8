"""Where blocks are compiled without being asked for, and what happens where that fails."""

import pytest
import torch
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.training.compiling import PAYS_FROM_STEPS, compilations, compile_blocks, compiling_pays

CUDA = torch.device("cuda")


def test_long_runs_on_cuda_with_all_tools_are_compiled(monkeypatch, tmp_path):
    compiler, header = tmp_path / "cc", tmp_path / "Python.h"
    for file in (compiler, header):
        file.touch(mode=0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr("sd3pipe.training.compiling.has_triton", lambda: True)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert compiling_pays(CUDA, PAYS_FROM_STEPS)
    assert not compiling_pays(CUDA, PAYS_FROM_STEPS - 1)
    assert not compiling_pays(torch.device("cpu"), PAYS_FROM_STEPS)
    header.unlink()
    assert not compiling_pays(CUDA, PAYS_FROM_STEPS)
    header.touch()
    monkeypatch.setenv("PATH", "")
    compiler.unlink()
    assert not compiling_pays(CUDA, PAYS_FROM_STEPS)


@pytest.mark.long
def test_what_cannot_be_compiled_runs_as_it_is_unless_compiling_was_asked_for():
    def broken(graph, examples):
        raise RuntimeError("no such kernel")

    inputs = random_inputs()
    expected = tiny_mmdit("sd35-large")(**inputs)
    for may_fail in (True, False):
        torch._dynamo.reset()
        model = tiny_mmdit("sd35-large")
        compile_blocks(model, backend=broken, may_fail=may_fail)
        if may_fail:
            assert torch.equal(model(**inputs), expected)
        else:
            with pytest.raises(Exception, match="no such kernel"):
                model(**inputs)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_no_size_of_picture_after_the_second_is_compiled_anew(sizes):
    graphs = []

    def count(graph, _examples):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny_mmdit("sd35-large")
    compile_blocks(model, backend=count, sizes=sizes)
    counts, compiled_before = [], compilations()
    for side in (8, 12, 16):
        with torch.no_grad():
            model(**random_inputs(height=side, width=8))
        counts.append(len(graphs))
    assert counts[2] == counts[1]
    assert (counts[1] == counts[0]) == (sizes > 1)  # told of several, the first graphs are general already
    assert compilations() - compiled_before == counts[2]
