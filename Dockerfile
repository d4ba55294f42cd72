# vlm_sft in a container; run it with a folder that has configurations, data and room for runs:
#
#   docker build --target cuda -t vlm-sft .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" vlm-sft \
#       stage2 my.yaml
#
# --ipc=host gives data-loader processes enough shared memory. Several GPUs:
#
#   docker run ... --entrypoint torchrun vlm-sft --nproc-per-node 8 -m vlm_sft.stage2 my.yaml
#
# The target `cpu` has the same without a GPU's extras. An index with builds of torch for CPUs makes it
# several GB smaller: --build-arg TORCH_INDEX=URL.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/work/.cache/huggingface
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# The libraries first: a change of this package's code does not install them again.
COPY constraints.txt ./
ARG TORCH_INDEX=""
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    $(grep -E '^(torch|torchvision)==' constraints.txt)
COPY pyproject.toml setup.py README.md LICENSE ./
COPY configs ./configs
COPY vlm_sft ./vlm_sft
COPY data_tools ./data_tools

FROM base AS cpu
RUN pip install --constraint constraints.txt '.[plots,tensorboard,datasets,serve,scores,instruct]'
WORKDIR /work
ENTRYPOINT ["vlm-sft"]
CMD ["--help"]

FROM base AS cuda
# A C compiler: Triton compiles kernels on the machine that runs them.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint constraints.txt '.[plots,tensorboard,datasets,qlora,serve,scores,instruct]'
WORKDIR /work
ENTRYPOINT ["vlm-sft"]
CMD ["--help"]
