"""Time and peak memory of loading an MMDiT of the real size, against the bytes that are kept.

    python benchmarks/loading.py --variant sd35-medium            a 5 GB file
    python benchmarks/loading.py --variant sd35-large             a 16 GB file; needs that much memory

Makes a checkpoint of random weights in --folder, loads it in a fresh process per method, deletes it. "cold" asks the
system to drop the file from its cache first. Peak memory is VmHWM of the process minus what it had with torch imported;
pages of a mapped file count as long as they are resident.

Methods: ours (sd3pipe.models.checkpoint.load_mmdit), ours-fp32 (the same, converted while it is read), fingerprint
(hash only), plain (safetensors.torch.load_file, then load_state_dict into a model that has memory, as trainers usually
do), mapped (load_file, then assigned: the mapping stays the storage; each page is touched, as a first step would).
"""

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sd3pipe.models.architecture import MMDiTArchitecture

ARCHITECTURES = {
    "sd3-medium": MMDiTArchitecture(depth=24, pos_embed_max=192, qk_norm=False),
    "sd35-medium": MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=tuple(range(13))),
    "sd35-large": MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True),
}
METHODS = ("ours", "ours-fp32", "fingerprint", "plain", "mapped")
PREFIX = "model.diffusion_model."
BLOCK_BYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=ARCHITECTURES, default="sd35-medium")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the checkpoint is made; default: a temporary one"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--warm-only", action="store_true", help="do not drop the file from the system's cache")
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.file)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "random.safetensors"
        write_checkpoint(path, ARCHITECTURES[arguments.variant])
        report(path, arguments.variant, arguments.methods, with_cold=not arguments.warm_only)


def write_checkpoint(path: Path, architecture: MMDiTArchitecture) -> None:
    """Writes random bfloat16 weights of every native key, block by block."""
    import torch

    header, position = {}, 0
    for key, shape in architecture.shapes().items():
        nbytes = 2 * torch.Size(shape).numel()
        header[PREFIX + key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = (torch.randn(BLOCK_BYTES // 2) * 0.02).bfloat16().view(torch.uint8).numpy().data
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, position, BLOCK_BYTES):
            handle.write(block[: min(BLOCK_BYTES, position - start)])
        handle.flush()
        os.fsync(handle.fileno())


def report(path: Path, variant: str, methods: list[str], *, with_cold: bool) -> None:
    """Prints one line a method."""
    import safetensors
    import torch

    stored = path.stat().st_size
    versions = f"torch {torch.__version__}, safetensors {safetensors.__version__}"
    print(f"{variant}: {stored / 1e9:.2f} GB in bfloat16; {versions}")
    print(f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, {time.strftime('%Y-%m-%d')}")
    columns = ("method", "cache", "seconds", "CPU s", "GB/s", "kept GB", "peak GB", "peak/kept")
    print("{:<12} {:<5} {:>8} {:>6} {:>6} {:>8} {:>8} {:>9}".format(*columns))
    for method in methods:
        for cache in ("cold", "warm") if with_cold else ("warm",):
            if cache == "cold":
                drop_from_cache(path)
            line = subprocess.run(
                [sys.executable, __file__, "--child", method, "--file", str(path)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()[-1]
            seconds, cpu, kept, peak = (json.loads(line)[name] for name in ("seconds", "cpu", "kept", "peak"))
            rate, ratio = stored / seconds / 1e9, f"{peak / kept:9.3f}" if kept else f"{'-':>9}"
            timing = f"{method:<12} {cache:<5} {seconds:8.2f} {cpu:6.2f} {rate:6.2f}"
            print(f"{timing} {kept / 1e9:8.2f} {peak / 1e9:8.2f} {ratio}", flush=True)


def drop_from_cache(path: Path) -> None:
    """Asks the system to forget the file's pages, which are clean because it was synced."""
    with open(path, "rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(method: str, path: Path) -> dict[str, float]:
    """Returns time, bytes kept and the rise of peak memory of one way of loading, in this fresh process."""
    import torch

    from sd3pipe.models import checkpoint
    from sd3pipe.models.mmdit import MMDiT
    from sd3pipe.models.sources import find_component

    architecture = checkpoint.mmdit_architecture(find_component("mmdit", model=path))
    before, started, cpu_started = peak_bytes(), time.perf_counter(), time.process_time()
    model = None
    if method == "ours":
        model = checkpoint.load_mmdit(path, dtype=torch.bfloat16)
    elif method == "ours-fp32":
        model = checkpoint.load_mmdit(path, dtype=torch.float32)
    elif method == "fingerprint":
        find_component("mmdit", model=path).fingerprint()
    else:
        from safetensors.torch import load_file

        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(path).items()}
        assign = method == "mapped"
        model = MMDiT(architecture, device="meta" if assign else "cpu", dtype=torch.bfloat16)
        model.load_state_dict(tensors, assign=assign)
    tensors_kept = model.state_dict().values() if model is not None else []
    if method == "mapped":  # touch every page once, as the first step would
        float(sum(tensor.view(torch.uint8).flatten()[::4096].sum() for tensor in tensors_kept))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    kept = sum(tensor.nbytes for tensor in tensors_kept)
    return {"seconds": seconds, "cpu": cpu, "kept": kept, "peak": peak_bytes() - before}


def peak_bytes() -> int:
    """Returns the peak resident memory of this program; getrusage would count what its parent had before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
