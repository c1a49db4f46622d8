"""All that is to be measured on a card, in ten minutes, with nothing to decide on the way.

    python benchmarks/card.py                    on a machine with a card; again, to go on where it stopped
    python benchmarks/card.py --peer CHECKOUT    with the offloading of sd-scripts or musubi-tuner beside ours
    python benchmarks/card.py --device cpu --tiny    a few minutes without a card: only shows that the script runs

A queue of rows, the most worth knowing first, each in a process of its own that is ended after 45 s (tests on the
card after 120 s). Each result is written when it is there, to benchmarks/results/DATE-card-NAME.json; rows that are in
that file are not run again, but for those that were cut off. Nothing is begun after 540 s. What a cut-off row compiled
stays in inductor's cache, so that a second go gets further. In the end, one table: seconds, the cost model's
prediction, the roofline (the longer of computing at the rate of one large matrix product and of copying, pass by pass),
and the ratios to both.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROW_SECONDS, TEST_SECONDS, ALL_SECONDS = 45, 120, 540
LEVELS = ("all", "attention", "none")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing to measure: a case of gpu_streaming.py, or a command whose success is the result."""

    name: str
    case: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    limit_seconds: int = ROW_SECONDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peer", type=Path, action="append", default=[])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--rows", type=int, help="only so many of the queue")
    parser.add_argument("--tiny", action="store_true", help="models of five blocks, pictures of 64 pixels")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("card.py needs a CUDA device, and there is none")
    name = torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu"
    file = arguments.results / f"{time.strftime('%Y-%m-%d')}-card-{name.replace(' ', '-').lower()}.json"
    results = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
    ends = time.monotonic() + ALL_SECONDS
    for row in queue(arguments.peer)[: arguments.rows]:
        if results.get(row.name, {"cut_off": True}).get("cut_off") and time.monotonic() < ends:
            results[row.name] = _run(row, arguments, min(row.limit_seconds, ends - time.monotonic()))
            _write(file, name, results)
            print(_line(row.name, results[row.name]), flush=True)
    print(f"\n{_HEADER}")
    for row_name, result in results.items():
        print(_line(row_name, result))
    print(f"written: {file}")


def queue(peers: list[Path]) -> list[Row]:
    """Returns all rows, the most worth knowing first."""
    rows = [_tests("compiled run with dropout", "test_a_compiled_run_learns_the_same or products", TEST_SECONDS)]
    rows += [_step("sd35-large", kept=kept) for kept in LEVELS]
    rows += [_step("sd35-large", matmul_dtype=format, kept="all") for format in ("int8", "fp8")]
    rows += [_step("sd35-large", batch=4, kept=kept) for kept in ("none", "attention")]
    rows += [_step("sd35-large", batch=4, kept="none", matmul_dtype=format) for format in ("fp8", "int8")]
    rows += [_step("sd35-large", blocks_to_swap=38, kept="none", matmul_dtype=format) for format in (None, "int8")]
    rows += [_step("sd35-large", blocks_to_swap=19, kept="none"), _step("sd35-large", blocks_to_swap=38, kept="all")]
    rows += [_step("sd35-medium", kept=kept) for kept in LEVELS]
    rows += [_peer_step(peer, kind, count) for peer in peers for kind in _kinds(peer) for count in (19, 36)]
    rows += [_step("sd35-medium", batch=4, kept=kept) for kept in ("all", "none")]
    rows += [_step("sd35-medium", kept="all", matmul_dtype=format) for format in ("int8", "fp8")]
    rows += [_tests("T5 streamed", "t5"), _tests("VAE in strips", "strips"), _tests("out of memory", "exit_8")]
    rows += [_tests("all other tests", "not compiled_run and not t5 and not strips and not exit_8", TEST_SECONDS)]
    return rows


def _step(model: str, **fields: Any) -> Row:
    case = {"model": model, "base_format": "dense", "blocks_to_swap": 0, "compiled": True, "pixels": 1024, "batch": 1}
    case |= fields
    products = f", {case['matmul_dtype']} products" if case.get("matmul_dtype") else ""
    name = f"{model}, batch {case['batch']}, {case['blocks_to_swap']} streamed, kept: {case['kept']}{products}"
    return Row(name=name, case=case)


def _peer_step(checkout: Path, kind: str, count: int) -> Row:
    case = {"model": "sd35-large", "base_format": "dense", "blocks_to_swap": count, "pixels": 1024, "batch": 1}
    return Row(name=f"{checkout.name} {kind}, {count} swapped", case=case | {"peer": f"{checkout}:{kind}"})


def _kinds(checkout: Path) -> list[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in checkout.rglob("custom_offloading_utils.py"))
    return [kind for kind in ("ModelOffloader", "LoRAStreamOffloader") if f"class {kind}" in text]


def _tests(name: str, expression: str, limit_seconds: int = ROW_SECONDS) -> Row:
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "gpu", "tests/gpu", "-k", expression)
    return Row(name=f"tests: {name}", command=command, limit_seconds=limit_seconds)


def _run(row: Row, arguments: argparse.Namespace, limit_seconds: float) -> dict[str, Any]:
    command = list(row.command)
    if row.case:
        case = dict(row.case)
        if arguments.tiny:
            case |= {
                "pixels": 64,
                "text_tokens": 8,
                "blocks_to_swap": min(case["blocks_to_swap"], 5),
                "compiled": False,
            }
        script = HERE / "gpu_streaming.py"
        command = [sys.executable, str(script), "--device", arguments.device, "--case", json.dumps(case)]
        command += ["--tiny"] if arguments.tiny else []
    started = time.monotonic()
    code, output = _ended_after(command, limit_seconds)
    result: dict[str, Any] = {"case": row.case, "row_seconds": round(time.monotonic() - started, 1)}
    if code is None:
        return result | {"cut_off": True, "left_out": f"not done in {limit_seconds:.0f} s"}
    if not row.case:
        return result | {"exit_code": code, "told": output.splitlines()[-1:]}
    if code != 0:
        return result | {"left_out": (output.strip().splitlines() or ["?"])[-1]}
    return result | json.loads(output.splitlines()[-1])


def _ended_after(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Returns exit code and output; None where the command, and all that it started, had to be ended."""
    child = subprocess.Popen(
        command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return None, ""
    return child.returncode, output


def _write(file: Path, device: str, results: dict[str, Any]) -> None:
    machine = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    text = json.dumps({**machine, "python": platform.python_version(), "rows": results}, indent=2)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(file)


_HEADER = f"{'row':<72} {'s/step':>8} {'predicted':>9} {'ratio':>6} {'roofline':>9} {'ratio':>6} {'GB':>6}"


def _line(name: str, result: dict[str, Any]) -> str:
    if "exit_code" in result:
        return f"{name:<72} exit {result['exit_code']} {' '.join(result['told'])}"
    if "left_out" in result:
        return f"{name:<72} {result['left_out']}"
    return (
        f"{name:<72} {result['seconds_per_step']:8.3f} {result['floor_seconds']:9.3f} {result['over_floor']:6.2f} "
        f"{result['roofline_seconds']:9.3f} {result['over_roofline']:6.2f} {result['peak_device_bytes'] / 1e9:6.2f}"
    )


if __name__ == "__main__":
    main()
