# An image with all of dmdr for NVIDIA GPUs; docs/clusters.md says how to build and use it.
#
# The CUDA of the base is that of the torch in constraints.txt. It is a -devel image, since DeepSpeed compiles its
# kernels (memory.offload_optimizer) with nvcc when a run first needs them.

ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ ninja-build openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/dmdr
ENV PATH=${VIRTUAL_ENV}/bin:${PATH}
RUN python3 -m venv ${VIRTUAL_ENV}

WORKDIR /src
COPY constraints.txt ./
COPY packages packages
ARG EXTRAS=eight-bit,bitsandbytes,torchao,wandb
RUN PIP_CONSTRAINT=constraints.txt pip install --no-cache-dir \
    ./packages/dmdr-core ./packages/dmdr-rewards ./packages/dmdr-models "./packages/dmdr-train[${EXTRAS}]"

# Ubuntu's image has a user 1000 of its own. Give --build-arg UID=$(id -u), so that you own what a run writes.
ARG UID=1000
RUN userdel --remove ubuntu 2>/dev/null || true; useradd --create-home --uid ${UID} dmdr
USER dmdr
WORKDIR /work

ENTRYPOINT ["dmdr-train"]
CMD ["--help"]
