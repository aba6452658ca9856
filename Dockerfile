# lowbit with its CUDA extension. Build:  docker build -t lowbit .
#   docker run --gpus all -v "$PWD:/data" -v "$HOME/.cache:/cache" lowbit quantize demo --output /data/demo-awq
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS build
# Ubuntu keeps only the newest of a package, so versions are not pinned.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/lowbit
ENV PATH=/opt/lowbit/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)"
COPY . .
ARG LOWBIT_CUDA_ARCHS="80 86 89 90a 90+PTX"
ENV LOWBIT_CUDA=1 LOWBIT_CUDA_ARCHS=$LOWBIT_CUDA_ARCHS
RUN pip install --no-cache-dir -c constraints.txt ".[all]"

FROM nvidia/cuda:12.8.1-base-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/lowbit /opt/lowbit
ENV PATH=/opt/lowbit/bin:$PATH HF_HOME=/cache/huggingface LOWBIT_CACHE=/cache/lowbit
WORKDIR /data
ENTRYPOINT ["lowbit"]
CMD ["--help"]
