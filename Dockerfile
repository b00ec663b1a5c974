# An image for NVIDIA GPUs. See docs/gpu.md. Neither built nor run yet.
#   docker build -t megatron-ligo .
#   docker run --gpus all --ipc host --ulimit memlock=-1 -v $PWD/runs:/app/runs megatron-ligo \
#       deepspeed tools/fit.py --config runs/run.toml --output runs/fit
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update && apt-get install -y --no-install-recommends \
        python3.12 python3.12-dev python3.12-venv build-essential git openssh-client pdsh && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements.txt requirements-models.txt pyproject.toml README.md LICENSE ./
COPY launch_scripts launch_scripts
COPY megatron_ligo megatron_ligo
COPY ds_configs ds_configs
COPY tools tools
# torch of the package index is built for CUDA 13. For an older driver: --build-arg TORCH_INDEX=.../whl/cu126.
ARG TORCH_INDEX=
ENV VENV=/opt/venv PYTHON=python3.12
RUN if [ -n "$TORCH_INDEX" ]; then export PIP_EXTRA_INDEX_URL="$TORCH_INDEX"; fi && bash launch_scripts/setup.sh
# Transformer Engine is optional: --build-arg TRANSFORMER_ENGINE=1 compiles it for some twenty minutes.
ARG TRANSFORMER_ENGINE=
RUN if [ -n "$TRANSFORMER_ENGINE" ]; then \
        /opt/venv/bin/python -m pip install --no-build-isolation "transformer_engine[pytorch]"; fi
ENV PATH=/opt/venv/bin:$PATH OMP_NUM_THREADS=1 PYTHONPATH=/app
