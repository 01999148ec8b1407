# The deployment side alone: ONNX Runtime, no MegEngine. docs/guides/serve.md says how it is used, and what it weighs.
FROM python:3.13-slim-trixie AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mgq mgq
RUN python -m pip install --no-cache-dir --no-compile --target /opt/mgq '.[serve]'
# What no deployed file needs: tests, sources and headers of packages, tools, colours for source code, and ONNX Runtime's
# copy for programs in C.
RUN rm -rf /opt/mgq/bin /opt/mgq/onnx/backend/test /opt/mgq/onnxruntime/transformers /opt/mgq/onnxruntime/tools
RUN rm -rf /opt/mgq/onnxruntime/quantization /opt/mgq/onnxruntime/datasets /opt/mgq/onnxruntime/capi/libonnxruntime.so*
RUN find /opt/mgq -type d '(' -name tests -o -name __pycache__ ')' -prune -exec rm -rf '{}' +
RUN rm -rf /opt/mgq/onnx/reference /opt/mgq/numpy/f2py /opt/mgq/pygments
RUN find /opt/mgq -type f '(' -name '*.pyi' -o -name '*.cc' -o -name '*.h' ')' -delete

# Python 3.13 of Debian 13 without a shell or a package manager. What the wheels need of the system is in it (libc6, libstdc++6,
# libgcc-s1, zlib1g), so nothing is installed here: tests/integration/test_container.py asks every binary.
FROM gcr.io/distroless/python3-debian13:nonroot
COPY --from=build /opt/mgq /opt/mgq
ENV PYTHONPATH=/opt/mgq PYTHONDONTWRITEBYTECODE=1 MGQ_CACHE=/tmp/mgq
EXPOSE 8000
ENTRYPOINT ["/usr/bin/python3", "-m", "mgq"]
CMD ["doctor"]
