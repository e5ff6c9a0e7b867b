# pear-serve, for one machine. `docker build -t pear-serve .`; compose.yaml runs it with Prometheus and Grafana.
# For another build of torch (without CUDA, say): --build-arg PIP_EXTRA_INDEX_URL=… with the address of its wheels.

FROM python:3.11-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/pear
# The pair of torch and torchvision that constraints.txt names, in a layer of its own: it is large and changes seldom.
COPY constraints.txt ./
RUN /opt/pear/bin/pip install --constraint constraints.txt torch torchvision
COPY pyproject.toml README.md LICENSE ./
COPY pear_store ./pear_store
COPY router ./router
COPY pear_train ./pear_train
RUN /opt/pear/bin/pip install --constraint constraints.txt '.[serve,remote]' && /opt/pear/bin/pip check

FROM python:3.11-slim-bookworm
RUN groupadd --gid 10001 pear && useradd --uid 10001 --gid pear --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pear
COPY --from=build /opt/pear /opt/pear
# Nothing is written but below /tmp: the file system may be read-only. Weights, if need be, are mounted.
ENV PATH=/opt/pear/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PEAR_STORE=/store \
    HF_HOME=/tmp/hf TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
USER 10001:10001
EXPOSE 8090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8090/readyz', timeout=4)"]
ENTRYPOINT ["pear-serve", "--host", "0.0.0.0"]
CMD ["--token-file", "/run/secrets/pear_token"]
