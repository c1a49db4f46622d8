# docker build -t sd3pipe .                             with the CUDA build of torch
# docker build -t sd3pipe --build-arg TORCH=cpu .       without
#
# docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/models:/models" -v sd3pipe-caches:/caches sd3pipe run
FROM python:3.13-slim
ARG TORCH=cu130

# Triton, which torch compiles with on a card, calls a C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --index-url https://download.pytorch.org/whl/$TORCH torch
COPY pyproject.toml README.md LICENSE ./
COPY sd3pipe ./sd3pipe
RUN pip install --no-cache-dir -c constraints.txt '.[optimizers,tensorboard,formats,studio]'

# With `--user "$(id -u):$(id -g)"` what it writes is yours.
RUN useradd --uid 1000 sd3pipe
RUN install --directory --mode=777 /caches /models /work
USER sd3pipe
ENV HF_HOME=/caches/huggingface TORCHINDUCTOR_CACHE_DIR=/caches/inductor TRITON_CACHE_DIR=/caches/triton XDG_STATE_HOME=/caches/state
VOLUME ["/caches", "/models", "/work"]
WORKDIR /work
ENTRYPOINT ["sd3pipe"]
CMD ["--help"]
