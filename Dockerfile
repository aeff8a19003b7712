# The core alone: `docker build -t carnet .`, then
# docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/data" carnet cross checkpoints/llama out/llama --to hf
FROM python:3.13-slim AS build
WORKDIR /src
ARG SOURCE_DATE_EPOCH
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md CITATION.cff SECURITY.md ./
COPY src src
RUN pip wheel --no-cache-dir --constraint constraints.txt --wheel-dir /wheels .

FROM python:3.13-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels pip install --no-cache-dir --no-index /wheels/*.whl \
    && useradd --create-home --uid 1000 carnet
USER 1000
WORKDIR /data
ENTRYPOINT ["carnet"]
