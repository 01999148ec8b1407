# The deployment side alone: ONNX Runtime and no MegEngine.
#   docker build -t mgq .
#   docker run -p 8000:8000 -v "$PWD":/data mgq serve -c /data/net.onnx --host 0.0.0.0
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mgq mgq
RUN python -m venv /opt/mgq && /opt/mgq/bin/python -m pip install --no-cache-dir --no-compile '.[serve]'
COPY mgq/service/slim.py slim.py
RUN /opt/mgq/bin/python slim.py /opt/mgq

FROM python:3.13-slim
COPY --from=build /opt/mgq /opt/mgq
RUN useradd --create-home mgq
USER mgq
ENV PATH=/opt/mgq/bin:$PATH PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
ENTRYPOINT ["mgq"]
CMD ["doctor"]
