# A rerank server with the bundled model inside:
#
#     docker build -t rerank-plugins .
#     docker run -p 8787:8787 -e RERANK_API_KEY=secret rerank-plugins
#
# Arguments are those of `rerank-plugins serve`; without a key, for a network that only friends reach: --no-auth.
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY rerank_plugins ./rerank_plugins
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile "$(echo /wheels/*.whl)[serve]" \
    && useradd --no-create-home --uid 10001 rerank
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
USER 10001
EXPOSE 8787
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8787/health', timeout=2)"]
ENTRYPOINT ["rerank-plugins", "serve", "--host", "0.0.0.0", "--port", "8787"]
CMD ["--api-key-env", "RERANK_API_KEY"]
