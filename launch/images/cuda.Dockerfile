# Build at the top of the repository: docker build -f launch/images/cuda.Dockerfile -t maxlm-cuda .
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY maxlm maxlm
COPY pallas_kernels pallas_kernels
COPY configs configs
COPY launch launch
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim-bookworm
COPY launch/images/cuda.lock.txt /tmp/
RUN pip install --no-cache-dir --require-hashes -r /tmp/cuda.lock.txt
COPY --from=wheel /wheel /tmp/wheel
RUN pip install --no-cache-dir --no-deps /tmp/wheel/*.whl \
    && useradd --uid 1000 --create-home maxlm
USER maxlm
WORKDIR /home/maxlm
ENTRYPOINT ["maxlm"]
