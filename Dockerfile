# ssl-bench for CPUs and, with --gpus all, for NVIDIA GPUs: PyTorch's Linux wheels bring their CUDA.
# README: "Docker". Patches of Python and Debian may move; what computes is in requirements.lock.
FROM python:3.11-slim-bookworm

# torch.compile compiles at run time; git tells each run its commit.
# Debian keeps only the newest of each package:
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

# exactly these versions (`make lock` renews them), in a layer that outlives changes of the code
WORKDIR /opt/ssl_bench
COPY requirements.lock .
RUN pip install --no-cache-dir -r requirements.lock

# editable: the checkout with its .git is what runs
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && git config --system --add safe.directory /opt/ssl_bench

# Runs and packed images go to the folder that is mounted at /work.
# Any --user may write to both folders: an ID of your own has no name or home here.
RUN useradd --uid 1000 --create-home ssl-bench \
    && install -d -m 1777 /work \
    && chmod 1777 /home/ssl-bench
ENV HOME=/home/ssl-bench SSL_BENCH_CACHE=/work/.cache/ssl_bench
WORKDIR /work
USER 1000
ENTRYPOINT ["ssl-bench"]
