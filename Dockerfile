# docker build -t gene-dml .      (with --build-arg TORCH_INDEX=URL for another build of PyTorch)
# docker run --gpus all -v DATA:/data -v LOGS:/logs gene-dml --mode train --config_name her2st/dml --data_dir /data --log_path /logs
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /gene-dml
ARG TORCH_INDEX=
COPY Makefile requirements.txt requirements.lock ./
RUN make setup TORCH_INDEX=$TORCH_INDEX
COPY . .
ENV PATH=/gene-dml/.venv/bin:$PATH
ENTRYPOINT ["python", "main.py"]
