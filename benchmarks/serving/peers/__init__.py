"""The same `DiTPipeline` behind four servers.

Each module but `pipeline` is a server, `python -m benchmarks.serving.peers.NAME` in `.venv-peers`,
and imports nothing of fineserve. All answer `POST /generate` with one PNG. All but `plain` batch
whole requests that agree in everything but class and seed: one `DiTPipeline` call cannot mix more.
"""
