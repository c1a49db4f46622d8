"""Time and peak memory of T5-XXL at its real width, resident and read block by block.

    python benchmarks/text_encoding.py                          all 24 blocks; 9.5 GB on the disk, as much memory
    python benchmarks/text_encoding.py --blocks 6 --captions 16 --tokens 77
    python benchmarks/text_encoding.py --methods streamed --device cuda

Makes random bfloat16 weights in --folder, encodes in a fresh process per method, deletes them. Peak memory is VmHWM of
the process minus what it had with torch and transformers imported; on CUDA also the allocator's peak. Both methods must
put out the same bits, which is checked.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from sd3pipe.models.text_architecture import T5Architecture

T5_XXL = T5Architecture(width=4096, depth=24, heads=64, mlp_width=10240, vocabulary=32128, distance_buckets=32)
METHODS = ("streamed", "resident")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the weights are made; default: a temporary one"
    )
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    architecture = replace(T5_XXL, depth=arguments.blocks)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "t5.safetensors"
        write_weights(path, architecture)
        results = {method: run_child(method, path) for method in arguments.methods}
    print(f"T5 of {arguments.blocks} blocks, {arguments.captions} captions of {arguments.tokens} tokens, bfloat16, "
          f"{arguments.device}, batch {arguments.batch}")  # fmt: skip
    for method, result in results.items():
        print(f"{method:9} {result['seconds']:7.1f} s  peak {result['peak_bytes'] / 1e9:5.2f} GB"
              f"  on the device {result['device_bytes'] / 1e9:5.2f} GB")  # fmt: skip
    assert len({result["bits"] for result in results.values()}) == 1, "the methods differ"


def write_weights(path: Path, architecture: T5Architecture) -> None:
    """Writes random weights of initialisation size, one tensor at a time."""
    import torch

    header, offset = {}, 0
    for key, shape in architecture.shapes().items():
        nbytes = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape in architecture.shapes().items():
            scale = 64**-0.5 if "SelfAttention.q" in key else 1.0
            values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator)
            scaled = values if len(shape) == 1 else values * scale * shape[-1] ** -0.5
            file.write(scaled.bfloat16().view(torch.uint8).numpy().data)


def run_child(method: str, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", method, "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Encodes random ids in this process and returns seconds, peak bytes and a digest of the output."""
    import numpy as np
    import torch

    from sd3pipe.models.sources import find_component
    from sd3pipe.models.text_encoders import T5Encoder
    from sd3pipe.models.tokenizers import TokenBatch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    batches = []
    for start in range(0, arguments.captions, arguments.batch):
        shape = (min(arguments.batch, arguments.captions - start), arguments.tokens)
        batches.append(TokenBatch(ids=rng.integers(3, 32000, shape), mask=np.ones(shape, dtype=np.uint8)))
    before, started = peak_bytes(), time.perf_counter()
    source = find_component("t5xxl", model=None, file=arguments.file)
    encoder = T5Encoder(source, dtype=torch.bfloat16, device=arguments.device, streamed=arguments.child == "streamed")
    states = [state.cpu() for state in encoder.encode(batches, masked=False)]
    seconds = time.perf_counter() - started
    digest = hashlib.sha256(b"".join(state.view(torch.uint8).numpy().tobytes() for state in states)).hexdigest()
    on_device = torch.cuda.max_memory_allocated() if arguments.device.startswith("cuda") else 0
    return {"seconds": seconds, "peak_bytes": peak_bytes() - before, "device_bytes": on_device, "bits": digest}


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark needs Linux: there is no VmHWM")


if __name__ == "__main__":
    main()
