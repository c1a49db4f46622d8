"""How fast pictures become rows: the whole stage against the VAE alone, and the feed with a VAE that costs nothing.

    python benchmarks/encode_latents.py [--pictures 32] [--feed-pictures 600] [--rounds 3] [--workers 2] [--threads N]

Three figures, each as pictures per second of wall time and as CPU milliseconds per picture (all processes together),
since only the latter means something on a busy machine; the last two lines hold them against the aims:
- stage: scan, decode, resize, real-size VAE with random weights at 256 px, hash, write, publish
- VAE alone: the same batches, already decoded, in memory
- feed: JPEG 1024 x 768 to the bucket 576 x 448 through the same code, the VAE replaced by an average over 8 x 8 pixels
"""

if __name__ == "__main__":
    from latent_stage import main  # torch, which the spawned workers do without

    main()
