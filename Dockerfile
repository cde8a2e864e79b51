# syntax=docker/dockerfile:1
# The program as an image, and an image with verified weights in it. docs/containers.md explains both.
#
#   docker build -t csm-weights .
#   docker build -t csm-1b --target weights --secret id=hf_token,src=token.txt .
#
# The token is a secret of the build: a file that one command sees, and no layer has.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md ./
COPY manifests manifests
COPY csm_weights csm_weights
RUN python3 -m venv /opt/csm-weights \
    && /opt/csm-weights/bin/pip install --quiet --no-cache-dir --constraint constraints.txt .

FROM ${BASE} AS program
COPY --from=build /opt/csm-weights /opt/csm-weights
# Any user may mount or make a volume here; the rest of the image is only read.
RUN mkdir -m 1777 /weights
WORKDIR /weights
ENV PATH=/opt/csm-weights/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["csm-weights"]
CMD ["--list"]

FROM program AS fetched
ARG MODEL=csm-1b
ARG ONLY=""
ARG HF_ENDPOINT=""
USER 0:0
RUN --mount=type=secret,id=hf_token \
    HF_TOKEN_PATH=/run/secrets/hf_token csm-weights weights --model "$MODEL" --only "$ONLY" \
    --dest "/weights/$MODEL" --no-smoke \
    && chmod -R a+rX,go-w /weights

FROM program AS weights
COPY --from=fetched /weights /weights

# What a build without --target makes.
FROM program AS tool
