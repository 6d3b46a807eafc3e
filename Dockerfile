FROM python:3.13-slim

# `docker build --label org.opencontainers.image.source=...` adds where it was built from.
LABEL org.opencontainers.image.title="users" org.opencontainers.image.licenses="MIT"

# Requirements before source: a change of main.py does not install them again. The tests' own stay out, as does the file.
RUN --mount=type=bind,source=requirements.txt,target=/requirements.txt \
    sed '/^# Tests/,$d' /requirements.txt > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# /data is the one place to write to: SQLite lies there when no DATABASE_URL is given.
RUN install -d -o 10001 -g 10001 /data
VOLUME /data
ENV DATABASE_URL=sqlite:////data/users.db

# The source is root's; the service runs as a number, by which an orchestrator sees that it is not root.
WORKDIR /app
COPY main.py .logging.json ./
USER 10001:10001

# Does the process answer? Whether its database does is for /readyz: a restart would not cure that.
EXPOSE 8000
HEALTHCHECK --start-period=40s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=3)"]

# It stops within the 30 s that an orchestrator grants (`docker stop` grants 10, if not told), and keeps connections
# longer than the 60 s of a load balancer. The log's format takes less time than uvicorn's own.
CMD ["uvicorn", "main:app", "--host=0.0.0.0", "--port=8000", "--log-config=.logging.json", "--timeout-graceful-shutdown=20", "--timeout-keep-alive=75"]
