"""OpenAI's HTTP API: what http_source answers. One file for each endpoint; `endpoints.py` lists them."""
