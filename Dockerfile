# The `vsc` command with its inference engine and the HTTP service, and no torch. See docs/container.md.
#
#   docker build -t vsc-serve .
#   docker build -t vsc-serve:cpu --build-arg BASE_IMAGE=debian:bookworm-slim --build-arg EXTRAS=cpu,serve .

# Any Debian or Ubuntu with Python 3.11 to 3.13 in its archive.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

FROM ${BASE_IMAGE} AS python
# A pinned version would be gone from the archive with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*

FROM python AS builder
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
# The venv that ships holds no pip: the one in /opt/build installs into it.
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/vsc
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vsc_serve vsc_serve
COPY training training
COPY export export
# Exactly one of cpu and gpu.
ARG EXTRAS=gpu,serve
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/pip wheel --no-deps --wheel-dir /dist . \
    && /opt/build/bin/pip --python /opt/vsc/bin/python install "$(echo /dist/*.whl)[${EXTRAS}]" \
    && /opt/vsc/bin/vsc --version
RUN if /opt/vsc/bin/python -c "import torch" 2> /dev/null; then \
        echo "torch came with EXTRAS=${EXTRAS}; it does not belong in this image" >&2; exit 1; \
    fi

FROM python
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin vsc
COPY --from=builder /opt/vsc /opt/vsc
# onnxruntime 1.32 and newer report their use to their maker unless told not to.
ENV ORT_DISABLE_TELEMETRY=1 \
    PATH=/opt/vsc/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VSC_MODEL=/model
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener as b; b(ProxyHandler({})).open('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["vsc"]
CMD ["serve", "--model", "/model", "--host", "0.0.0.0"]
