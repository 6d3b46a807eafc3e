FROM python:3.14-slim

# Requirements before source: a change of main.py does not install them again. The tests' own stay out.
COPY requirements.txt .
RUN sed '/^# Tests/,$d' requirements.txt > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt

# /data is the one place to write to: SQLite lies there when no DATABASE_URL is given.
RUN install -d -o 10001 -g 10001 /data
VOLUME /data
ENV DATABASE_URL=sqlite:////data/users.db

WORKDIR /app
COPY main.py .
USER 10001:10001
EXPOSE 8000

HEALTHCHECK --start-period=30s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/livez', timeout=3)"]

# It stops within the 30 s that an orchestrator grants, and keeps connections longer than the 60 s of a load balancer.
CMD ["uvicorn", "main:app", "--host=0.0.0.0", "--port=8000", "--timeout-graceful-shutdown=20", "--timeout-keep-alive=75"]
